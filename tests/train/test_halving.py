"""Batches that do not fit are taken in parts, with the same result, or refused in a line."""

import copy

import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt.train.halving import InParts, halving
from fastadapt.train.step import training_step


def fits(model, most):
    """A stand-in for a GPU whose memory holds ``most`` samples."""

    def logits(x):
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(x)

    return logits


@pytest.mark.parametrize("shares", [False, True])
def test_gradients_are_added_up_over_parts(shares):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    halved, lines, results = copy.deepcopy(model), [], []
    x, labels = torch.randn(7, 5), torch.tensor([0, 1, 2, 0, 1, 2, -100])
    if shares:
        labels = torch.rand(7, 3).softmax(1)
    for one, most in ((model, 99), (halved, 2)):
        step = training_step(
            fits(one, most),
            torch.optim.SGD(one.parameters(), lr=0.1),
            class_weights=torch.tensor([1.0, 2.0, 0.5]),
            label_smoothing=0.1,
            clip_grad=1.0,
            on_full=halving(one, "batch_size", lines.append),
        )
        for _ in range(2):
            loss, right = step(0.1, labels, x)
        results.append((loss, right))
    assert [line.split("over ")[1][:7] for line in lines] == ["2 parts", "4 parts"]
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert results[0][1] == results[1][1]
    for ours, theirs in zip(halved.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_batch_norms_that_train_and_single_images_are_refused():
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    full = halving(model, "batch_size2", lambda line: None)
    step = training_step(fits(model, 2), optimizer, on_full=full)
    with pytest.raises(fa.InputError, match=r"batch norms that train .* smaller `batch_size2`"):
        step(0.1, torch.zeros(4, dtype=torch.int64), torch.randn(4, 5))
    model.eval()
    step = training_step(fits(model, 0), optimizer, on_full=full)
    with pytest.raises(torch.OutOfMemoryError):
        step(0.1, torch.zeros(4, dtype=torch.int64), torch.randn(4, 5))


def test_independent_samples_are_computed_in_parts():
    lines = []
    parts = InParts(fits(nn.Identity(), 3), lines.append)
    x = torch.randn(8, 2)
    assert torch.equal(parts(x), x) and torch.equal(parts(x), x)
    assert len(lines) == 2
    with pytest.raises(torch.OutOfMemoryError):
        InParts(fits(nn.Identity(), 0), lines.append)(x)
