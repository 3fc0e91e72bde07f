"""Learning rates, ours and those of the papers' code, restated here from that code."""

import math
from itertools import pairwise

import pytest
import torch

from fastadapt.train.schedule import Schedule, learning_rate


def test_ours_warms_up_and_falls():
    rates = [learning_rate(step, 10, 4, 1.0) for step in range(1, 11)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a > b > 0 for a, b in pairwise(rates[4:]))
    plan = Schedule("cosine", 1.0, epochs=5, steps=2, warmup_epochs=2.0)
    assert [plan.rate(step) for step in range(1, 11)] == rates


@pytest.mark.parametrize(("epochs", "steps", "warmup"), [(100, 7, 2), (5, 1, 2), (3, 4, 0)])
def test_cladapter_s(epochs, steps, warmup):
    """``train_epoch`` of upstream's train.py; main() adds 1 to ``args.epochs`` before it runs."""
    peak, last = 1e-4, epochs + 1
    expected = []
    for epoch in range(1, last):
        for iteration in range(steps):
            present = (epoch - 1) * steps + iteration
            if epoch <= warmup:
                alpha = present / (warmup * steps)
                expected.append(peak * min(0.01 * (1.0 - alpha) + alpha, 1.0))
            else:
                expected.append(0.5 * peak * (1.0 + math.cos(math.pi * present / (last * steps))))
    plan = Schedule("cladapter", peak, epochs, steps, float(warmup))
    found = [plan.rate(step) for step in range(1, epochs * steps + 1)]
    assert found == pytest.approx(expected, rel=1e-12)
    if warmup:
        assert found[0] == pytest.approx(0.01 * peak)
    assert found[-1] > 0


@pytest.mark.parametrize(("peak", "epochs"), [(3.5e-3, 15), (2.6e-3, 25)])
def test_gdpl_s(peak, epochs):
    """PyTorch's cosine as its successor, one epoch of a constant before it, as in dassl."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(epochs))
    expected, steps = [], 3
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    for epoch in range(epochs):
        expected += [optimizer.param_groups[0]["lr"]] * steps
        optimizer.step()
        if epoch == 0:
            optimizer.param_groups[0]["lr"] = cosine.get_last_lr()[0]
        else:
            cosine.step()
    plan = Schedule("gdpl", peak, epochs, steps, 1.0)
    assert [plan.rate(step) for step in range(1, epochs * steps + 1)] == pytest.approx(expected)
    if epochs == 15:
        assert plan.rate(epochs * steps) == pytest.approx(1.5e-4, rel=0.02)
