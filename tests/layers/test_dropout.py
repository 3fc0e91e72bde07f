"""Dropout on a CPU drops the share that was asked for, keeps the mean, and follows the seed."""

import pytest
import torch

from fastadapt.layers.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_share_mean_and_gradient(p):
    torch.manual_seed(0)
    x = torch.ones(300, 401, requires_grad=True)
    dropout = Dropout(p)
    y = dropout(x)
    y.sum().backward()
    assert abs((y == 0).float().mean().item() - p) < 0.005
    assert y.detach().max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    assert torch.equal(x.grad, y.detach())
    # Neighbours are independent: the four values of one number, and those of two.
    kept = (y.detach().flatten() > 0).float() - (1 - p)
    for distance in (1, 2, 3, 4):
        assert abs((kept[distance:] * kept[:-distance]).mean().item()) < 0.003
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)


def test_what_nn_dropout_does_otherwise():
    x = torch.randn(4, 5)
    assert Dropout(0.5).eval()(x) is x or torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert Dropout(1.0)(x).abs().sum() == 0
