"""Which shapes and dtypes the depthwise convolution with normalisation takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import why_not_device

SIZE = 7  # of the filters
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS = 4096  # a program holds all channels of its pixels


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError for shapes that do not fit x [B, H, W, C]."""
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, H, W, C]")
    _, height, width, channels = x.shape
    if tuple(weight.shape) != (SIZE * SIZE, channels):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected ({SIZE * SIZE}, C={channels})"
        )
    if tuple(bias.shape) not in ((channels,), (height, width, channels)):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; expected [C={channels}] or "
            f"[{height}, {width}, {channels}]"
        )


def why_not_triton(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> str | None:
    """Say why the kernel cannot take this call; ``None`` if it can."""
    reason = why_not_device(x)
    if reason is not None:
        return reason
    for kind in (x.dtype, weight.dtype, bias.dtype, dtype):
        if kind not in DTYPES:
            return f"dtype {kind}; the kernel takes float32, bfloat16 and float16"
    if x.numel() == 0 or x.shape[-1] > MAX_CHANNELS:
        return f"x {tuple(x.shape)}; the kernel takes 1 to {MAX_CHANNELS} channels"
    if x[0].numel() >= 2**31:
        return f"{x[0].numel()} values in an image; the kernel takes fewer than 2³¹"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        return "gradients are on, and this operation has none"
    return None
