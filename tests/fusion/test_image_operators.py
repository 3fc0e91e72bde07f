"""A network runs with our depthwise convolutions and batch norms, and computes the same."""

import copy
from contextlib import nullcontext

import timm
import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from fastadapt.fusion.image_operators import (
    ImageOperators,
    batch_counters,
    image_operators,
    padded_channels,
    training_norms,
)
from fastadapt.kernels import depthwise_conv2d
from tests.helpers.kernel_checks import gpu


def relative(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def gradients(model, x, context=None):
    model.zero_grad()
    if context is None:
        y = model(x)
    else:
        with context:
            y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_norms_are_found_with_their_activations():
    model = nn.Sequential(
        BatchNormAct2d(4, act_layer=nn.ReLU6),
        BatchNormAct2d(4, act_layer=nn.GELU),
        nn.BatchNorm2d(4),
        BatchNormAct2d(4, drop_layer=nn.Dropout),
        nn.BatchNorm2d(4).eval(),
        nn.BatchNorm2d(4, affine=False),
    )
    found = training_norms(model)
    assert [found.get(id(m.weight)) for m in model[:5]] == ["relu6", "none", "none", "none", None]
    assert len(found) == 4
    assert type(image_operators(model, torch.zeros(1, 4, 2, 2))).__name__ == "nullcontext"


def test_calls_are_taken_over_and_activations_applied_once():
    torch.manual_seed(0)
    norms = [BatchNormAct2d(6, act_layer=act) for act in (nn.ReLU6, nn.SiLU, nn.GELU)]
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), norms[0], nn.Conv2d(6, 6, 3, groups=6), norms[1], norms[2], nn.SiLU()
    )
    plain = copy.deepcopy(model)
    x = 3 * torch.randn(4, 3, 6, 6)
    counters = batch_counters(model)
    context = ImageOperators(training_norms(model), counters=counters, backend="reference")
    assert len(counters) == 3
    (ours, ours_grads), (theirs, grads) = gradients(model, x, context), gradients(plain, x)
    assert relative(ours, theirs) < 1e-5
    for name, gradient in grads.items():
        assert (ours_grads[name] - gradient).abs().max() < 1e-4, name
    for (name, one), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-6), name


def test_convolutions_of_single_pixels_are_products(monkeypatch):
    """With channels last; other layouts, strides and groups stay as they are.

    Channels-last weights make the first convolution's output so, whatever its input.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 6, 1, bias=False),
        nn.Conv2d(6, 6, 1, groups=2),
        nn.Conv2d(6, 6, 1, stride=2),
        nn.Conv2d(6, 4, 1, padding=1),
    ).to(memory_format=torch.channels_last)
    products, real = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: products.append(a[1].shape) or real(*a))
    expected = {torch.channels_last: [(8, 3), (6, 8)], torch.contiguous_format: [(6, 8)]}
    for layout, taken in expected.items():
        x = torch.randn(2, 3, 5, 7).to(memory_format=layout)
        ours, ours_grads = gradients(model, x, ImageOperators({}))
        assert products == taken
        theirs, grads = gradients(model, x)
        assert ours.stride() == theirs.stride() and torch.allclose(ours, theirs, atol=1e-5)
        for name, gradient in grads.items():
            assert torch.allclose(ours_grads[name], gradient, atol=1e-4), name
        products.clear()


class Same(nn.Module):
    """Depthwise convolutions with "same" padding, and other uses of padding."""

    def __init__(self):
        super().__init__()
        self.first = Conv2dSame(4, 4, 3, stride=2, groups=4, bias=False)
        self.second = Conv2dSame(4, 4, 5, stride=2, groups=4)
        self.other = nn.Conv2d(4, 6, 1)

    def forward(self, x):
        x = self.second(self.first(x))
        y = nn.functional.pad(x, (0, 1, 0, 1))
        return torch.cat([self.other(y), self.other(nn.functional.pad(x, (1, 0, 1, 0)))]), y


def test_padding_before_a_depthwise_convolution_is_the_kernels(monkeypatch):
    torch.manual_seed(0)
    paddings = []

    def convolve(**given):
        paddings.append((given["padding"], given["padding_end"]))
        return depthwise_conv2d(**given)

    monkeypatch.setattr("fastadapt.fusion.image_operators.depthwise_conv2d", convolve)
    model = Same()
    assert padded_channels(model) == {4}
    x = torch.randn(2, 4, 14, 14, requires_grad=True)
    found = {}
    for name, context in (
        ("plain", nullcontext()),
        ("ours", ImageOperators({}, padded_channels(model), backend="reference")),
    ):
        with context:
            y, last = model(x)
        found[name] = (y, last, *torch.autograd.grad(y.square().sum() + last.sum(), x))
    assert paddings == [(0, 1), (2, 2)]
    for one, other in zip(found["ours"], found["plain"], strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@gpu
def test_a_network_trains_the_same_on_a_gpu():
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=0).cuda().train()
    plain = copy.deepcopy(model)
    exact = copy.deepcopy(model)
    x = torch.randn(8, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    truth, true_grads = gradients(exact, x)
    with torch.autocast("cuda", torch.bfloat16):
        (ours, ours_grads) = gradients(model, x, image_operators(model, x))
        (theirs, grads) = gradients(plain, x)
    assert relative(ours, truth) < 2 * relative(theirs, truth) + 0.01
    for name, gradient in true_grads.items():
        budget = 2 * relative(grads[name], gradient) + 0.02
        assert relative(ours_grads[name], gradient) < budget, name
    for (name, one), other in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.allclose(one.float(), other[1].float(), rtol=1e-2, atol=1e-3), name
