"""Launches of LayerNorm with the mean over tokens."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, block, device_of
from . import block_sizes
from .triton_mean import mean_of_partials_kernel, normalized_sum_kernel


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, *, save: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Normalize tokens x [B, N, C] and average them, in ``dtype``.

    Returns:
        The mean [B, C]; with ``save`` each token's mean and rstd, [2, B · N] fp32.
    """
    x = x if x.stride(2) == 1 else x.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    samples, tokens, width = x.shape
    strides = (x.stride(0), x.stride(1))
    sums, mean, count = _launches(samples, tokens, width, strides, eps, device_of(x.device.index))
    out = torch.empty((samples, width), dtype=dtype, device=x.device)
    partials = torch.empty((samples, count, width), dtype=torch.float32, device=x.device)
    stats = None
    if save:
        stats = torch.empty((2, samples * tokens), dtype=torch.float32, device=x.device)
    sums(x, partials, stats)
    mean(partials, weight, bias, out)
    return out, stats


@functools.lru_cache(maxsize=4096)
def _launches(
    samples: int, tokens: int, width: int, strides: tuple[int, int], eps: float, device: Device
) -> tuple[Launch, Launch, int]:
    """Prepare both kernels, and count the programs that share a sample."""
    share = block_sizes.tokens_per_program(samples, tokens, device)
    partials = ceil_div(tokens, share)
    columns = block(width)
    sample_stride, token_stride = strides
    sums = Launch(
        normalized_sum_kernel,
        (samples, partials),
        device,
        (tokens, share, sample_stride),
        (token_stride, width, eps, 4, columns),
        warps=min(16, columns // 256 or 1),
    )
    mean = Launch(
        mean_of_partials_kernel,
        (samples, ceil_div(width, 128)),
        device,
        (partials, tokens, width),
        (min(64, block(partials, 1)), 128),
        warps=4,
    )
    return sums, mean, partials
