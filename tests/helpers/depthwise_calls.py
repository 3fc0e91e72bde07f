"""Random calls of the depthwise convolution, for its GPU test and ``tools/random_calls.py``."""

from __future__ import annotations

import random
from functools import partial

import torch

from fastadapt.kernels import depthwise_conv2d, depthwise_conv2d_reference
from tests.helpers.kernel_checks import beyond_pytorch, output_and_gradients

NAMES = ("y", "x", "weight", "bias")
KINDS = ("channels last", "plain", "sliced", "transposed", "expanded")


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
    k, stride = choose.choice([1, 2, 3, 3, 5, 7, 9]), choose.choice([1, 1, 2, 3, 4])
    padding = choose.choice([0, k // 2, k // 2, k - 1, k])
    channels = choose.choice([1, 5, 16, 32, 33, 70, 96, 144, 384, 1000])
    height = choose.choice([1, 4, 7, 14, 15, 28, 56, 75])
    width = choose.choice([height, height, 1, 9, 31, 64])
    height, width = (max(size, k - 2 * padding, 1) for size in (height, width))
    batch = choose.randint(1, 32)
    if small:
        dtype = torch.float16 if dtype is torch.bfloat16 else dtype
        weight_dtype = torch.float16 if weight_dtype is torch.bfloat16 else weight_dtype
        k, padding = min(k, 5), min(padding, 5)
        batch, channels, height, width = min(batch, 2), min(channels, 40), 8, 9
    batch = max(1, min(batch, 2**23 // (channels * height * width)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x = normal(batch, channels, height, width)
    kind = choose.choice(KINDS)
    if kind == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif kind == "sliced":
        x = normal(batch, channels + 3, height, width + 1)[:, 2 : 2 + channels, :, 1:]
    elif kind == "transposed":
        x = normal(batch, channels, width, height).mT
    weight = torch.randn(channels, 1, k, k, device=device).to(weight_dtype)
    bias = None if case % 7 == 0 else torch.randn(channels, device=device).to(weight_dtype)
    args = [x, weight, bias]
    rows, cols = ((size + 2 * padding - k) // stride + 1 for size in (height, width))
    g = normal(batch, channels, rows, cols)
    if kind == "transposed":
        g = normal(batch, channels, cols, rows).mT
    elif kind == "expanded":  # as the gradient of a mean over pixels
        g = normal(batch, channels, 1, 1).expand(batch, channels, rows, cols)

    def call(function, *tensors):
        return function(*tensors, stride, padding)

    reference = partial(call, depthwise_conv2d_reference)
    # PyTorch's own kernels, in full fp32: cuDNN needs half a second for each new shape.
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        truth = output_and_gradients(reference, args, g, torch.float64)
        theirs = output_and_gradients(reference, args, g)
    ours = output_and_gradients(partial(call, partial(depthwise_conv2d, backend="triton")), args, g)
    names = [name for name, t in zip(NAMES, ("y", *args), strict=True) if t is not None]
    found = beyond_pytorch(names, ours, theirs, truth, dtype)
    if found:
        sizes = (batch, channels, height, width, k, stride, padding)
        found.insert(0, f"case {case}: {sizes, dtype, weight_dtype, kind}")
    return found
