"""Sums over processes: two that split a batch train as one does."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn

from fastadapt.train.step import IGNORED, training_step
from tests.helpers.processes import run_processes

pytestmark = pytest.mark.forks


class Network(nn.Module):
    """A batch norm, channels last, a parameter without gradient and one of another dtype."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.unused = nn.Linear(2, 2)
        self.shift = nn.Parameter(torch.zeros(8, dtype=torch.float64))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)) + self.shift.float())


def train(model, batches, sums=None):
    """Steps with weighted classes, smoothing and clipping; the losses and right predictions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = training_step(
        model,
        optimizer,
        class_weights=torch.tensor([1.0, 2.0, 0.5, 1.0]),
        label_smoothing=0.1,
        clip_grad=0.5,
        sums=sums,
    )
    return [[value.item() for value in step(0.01, labels, x)] for x, labels in batches]


def in_a_process(model, batches, folder):
    from fastadapt.train.distributed import connected

    with connected(torch.device("cpu")) as processes:
        rank, size = processes.place.rank, processes.place.size
        mine = []
        for x, labels in batches:
            pieces = [part.tensor_split(size)[rank] for part in (x, labels)]
            if len(pieces[1]) == 0:
                pieces = [x[:1], torch.full_like(labels[:1], IGNORED)]
            mine.append(pieces)
        found = train(model, mine, processes.gradient_sum(model))
        torch.save((found, model.state_dict()), folder / f"{rank}.pt")


@pytest.mark.parametrize("frozen_norm", [False, True])
def test_two_processes_take_the_steps_of_one(tmp_path, frozen_norm):
    torch.manual_seed(0)
    model = Network().to(memory_format=torch.channels_last).train()
    model.norm.train(not frozen_norm)
    # Even and uneven pieces; in the last batch a process has no image.
    batches = [(torch.randn(n, 3, 6, 6), torch.randint(4, (n,))) for n in (6, 5, 6, 1)]
    one = copy.deepcopy(model)
    expected = train(one, batches)
    assert run_processes(2, partial(in_a_process, model, batches, tmp_path)) == [0, 0]
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found, state in both:
        flat = zip(itertools.chain(*expected), itertools.chain(*found), strict=True)
        assert all(abs(a - b) < 1e-4 for a, b in flat)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4, msg=name)
    for name, value in both[0][1].items():
        assert torch.equal(value, both[1][1][name]), name
