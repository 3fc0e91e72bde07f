"""Provide steps, batches and a stand-in for CUDA's graphs to the tests of CUDA graphs."""

import json

import pytest
import torch
from torch import nn

from fastadapt import cuda_graph
from fastadapt.train.step import training_step


class StandIn:
    """Stand in for CUDA: replay a step by calling it again on the inputs of its capture."""

    def __init__(self, why_not=None, error=None):
        self.why_not, self.error = why_not, error
        self.eager = self.replays = self.captures = 0

    def install(self, monkeypatch):
        monkeypatch.setattr(cuda_graph, "graph_capture", lambda device: self)
        return self

    def run(self, call):
        self.eager += 1
        return cuda_graph.map_outputs(call(), torch.Tensor.detach)

    def watch(self, call):
        return self.run(call), self.why_not

    def capture(self, step):
        self.captures += 1
        if self.error is not None:
            raise self.error
        outputs = None

        def replay():
            nonlocal outputs
            self.replays += 1
            made = cuda_graph.map_outputs(step(), torch.Tensor.detach)
            if outputs is None:
                outputs = made
            for old, new in zip(outputs, made, strict=True):  # the same memory every time
                old.copy_(new)
            return outputs

        return replay


def network(device="cpu", dropout=0.0):
    torch.manual_seed(0)
    layers = nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 5)
    return nn.Sequential(*layers).to(device)


def optimizers(kind, parameters, device):
    fused = True if device != "cpu" else None
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=1e-3, fused=fused)
    made = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
    return made(parameters, lr=1.0, weight_decay=1e-2, fused=fused)


def batches(count, device="cpu", sizes=(8,)):
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        size = sizes[index % len(sizes)]
        x = torch.randn(size, 12, generator=generator).to(device)
        yield x, torch.randint(5, (size,), generator=generator).to(device)


def trained(kind="adamw", *, graph, device="cpu", dropout=0.0, steps=12, sizes=(8,), **settings):
    """Train some steps at a changing learning rate; return weights, losses and hits."""
    model = network(device, dropout)
    optimizer = optimizers(kind, model.parameters(), device)
    step = training_step(model, optimizer, graph=graph, **settings)
    torch.manual_seed(2)
    found = [
        step(0.1 / (1 + index), labels, x)
        for index, (x, labels) in enumerate(batches(steps, device, sizes))
    ]
    losses, right = zip(*found, strict=True)
    return [p.detach() for p in model.parameters()], torch.stack(losses), torch.stack(right)


def same(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one[1:], other[1:], strict=True):
        assert torch.equal(a, b)


def rows_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def count_replays(monkeypatch):
    replays = []
    real = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or real(graph)
    )
    return replays


def near(rows, others, loose):
    """Check that the losses of every epoch are equal but for rounding."""
    assert len(rows) == len(others)
    for one, other in zip(rows, others, strict=True):
        assert one["lr"] == other["lr"]
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=loose, abs=loose)


def bf16():
    return torch.autocast("cuda", torch.bfloat16)
