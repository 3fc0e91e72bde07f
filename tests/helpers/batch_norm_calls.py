"""Random calls of batch norm with its activation, for its tests and ``tools/random_calls.py``."""

from __future__ import annotations

import random
from functools import partial

import torch
from torch import Tensor

from fastadapt.kernels import batch_norm_act, batch_norm_act_reference
from fastadapt.kernels.batch_norm_act.reference import ACTIVATIONS
from tests.helpers.kernel_checks import beyond_pytorch, output_and_gradients

NAMES = ("y", "x", "weight", "bias", "running_mean", "running_var")
KINDS = ("channels last", "plain", "sliced", "transposed", "expanded")
# Where an activation's slope changes.
KINKS = {"none": (), "silu": (), "relu": (0.0,), "relu6": (0.0, 6.0)}
FEWEST = 16  # values of a channel; with two, say, the gradient of x is nothing but rounding


def random_case(case: int, device: str = "cuda", *, small: bool = False) -> list[str]:
    """Make one call with random sizes, dtypes, strides; return what is wrong with it.

    Args:
        case: the seed.
        device: where.
        small: few numbers, for the interpreter.
    """
    torch.manual_seed(case)
    choose = random.Random(case)
    dtype = choose.choice([torch.bfloat16, torch.float16, torch.float32])
    weight_dtype = choose.choice([dtype, torch.float32])
    channels = choose.choice([1, 5, 16, 24, 33, 70, 96, 144, 384, 1000])
    height, width = (choose.choice([1, 2, 4, 7, 15, 28, 56, 75]) for _ in range(2))
    batch, activation = choose.randint(1, 32), choose.choice(list(KINKS))
    keeps, kind = choose.random() < 0.7, choose.choice(KINDS)
    momentum, eps = choose.choice([0.0, 0.1, 1.0]), choose.choice([1e-5, 1e-3])
    if keeps:  # PyTorch demands one dtype of weights and running statistics on a GPU
        weight_dtype = torch.float32
    if small:
        dtype, weight_dtype = (
            (torch.float16, torch.float32) if dtype.itemsize == 2 else (dtype,) * 2
        )
        batch, channels, height, width = min(batch, 3), min(channels, 40), 5, 7
    batch = max(1, min(batch, 2**23 // (channels * height * width)))
    batch = max(batch, -(-FEWEST // (height * width)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    def images() -> Tensor:
        # Channels with a mean and a deviation of their own.
        x = normal(batch, channels, height, width) * (0.5 + normal(channels, 1, 1).abs())
        return (x + 2 * normal(channels, 1, 1)).to(dtype)

    x = images()
    if kind == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "sliced":
        x = torch.nn.functional.pad(x, (1, 0, 0, 0, 2, 1))[:, 2 : 2 + channels, :, 1:]
    elif kind == "transposed":
        x = x.mT.contiguous().mT
    weight, bias = (1 + 0.5 * normal(channels)).to(weight_dtype), normal(channels).to(weight_dtype)
    running = (normal(channels), normal(channels).abs()) if keeps else ()
    g = normal(batch, channels, height, width).to(dtype)
    if kind == "expanded":  # as the gradient of a mean over pixels
        g = normal(batch, channels, 1, 1).to(dtype).expand_as(x)
    g = away_from_kinks(g, x, weight, bias, eps, KINKS[activation])

    def call(function, kept: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kept += [t.clone() if x.dtype != torch.float64 else t.double() for t in running]
        return function(x, weight, bias, *(kept or (None, None)), momentum, eps, activation)

    def results(function, dtype: torch.dtype | None = None) -> list[Tensor]:
        kept: list[Tensor] = []
        found = output_and_gradients(partial(call, function, kept), (x, weight, bias), g, dtype)
        return [*found, *kept]

    truth = results(batch_norm_act_reference, torch.float64)
    theirs = results(batch_norm_act_reference)
    ours = results(partial(batch_norm_act, backend="triton"))
    cancels = cancellation(x, weight, bias, g, eps, activation)
    found = beyond_pytorch(NAMES[: len(ours)], ours, theirs, truth, dtype, cancellation=cancels)
    if found:
        sizes = (batch, channels, height, width, activation, keeps, momentum, eps)
        found.insert(0, f"case {case}: {sizes, dtype, weight_dtype, kind}")
    return found


def away_from_kinks(
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, kinks: tuple[float, ...]
) -> Tensor:
    """Return a gradient that is zero where rounding decides on which side of a kink a value is."""
    if not kinks:
        return g
    y = batch_norm_act_reference(x.double(), weight.double(), bias.double(), eps=eps)
    near = 1e-3 if x.dtype == torch.float32 else 0.1
    for kink in kinks:
        g = torch.where((y - kink).abs() < near, 0, g)
    return g


def cancellation(
    x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, eps: float, activation: str
) -> dict[str, float]:
    """Norms of the terms of both gradients' sums over pixels, by the norms of the sums; in fp64."""
    x = x.detach().double()
    ones = x.new_ones(x.shape[1])
    normal = batch_norm_act_reference(x, ones, 0 * ones, eps=eps)
    # A weight and a bias for each value: their gradients are the value's terms.
    leaves = [
        t.detach().double()[:, None, None].expand_as(x).clone().requires_grad_()
        for t in (weight, bias)
    ]
    y = ACTIVATIONS[activation](normal * leaves[0] + leaves[1])
    terms = torch.autograd.grad(y, leaves, g.double())
    return {
        name: float(t.norm() / t.sum((0, 2, 3)).norm().clamp_min(1e-300))
        for name, t in zip(("weight", "bias"), terms, strict=True)
    }
