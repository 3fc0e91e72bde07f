"""Which shapes and dtypes the narrow MLP takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import why_not_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128  # channels; of 256 two products are the faster way


def check_shapes(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor,
) -> None:
    """Raise ValueError for shapes that do not fit x [M, C] and fc1_weight [H, C]."""
    if x.dim() != 2 or fc1_weight.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and fc1_weight {tuple(fc1_weight.shape)}; expected "
            "[M, C] and [H, C]"
        )
    width, hidden = x.shape[1], len(fc1_weight)
    expected = {
        "fc1_weight": (fc1_weight, (hidden, width)),
        "fc1_bias": (fc1_bias, (hidden,)),
        "fc2_weight": (fc2_weight, (width, hidden)),
        "fc2_bias": (fc2_bias, (width,)),
        "residual": (residual, tuple(x.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")


def why_not_triton(
    x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, residual: Tensor
) -> str | None:
    """Say why the kernel cannot take this call; ``None`` if it can."""
    reason = why_not_device(x)
    if reason is not None:
        return reason
    if x.shape[1] > WIDEST:
        return f"{x.shape[1]} channels; the kernel takes up to {WIDEST}"
    for t in (x, fc1_weight, fc2_weight):
        if t.dtype not in DTYPES or t.dtype != x.dtype:
            return f"dtype {t.dtype}; the kernel takes float32, bfloat16 and float16, all the same"
        if t.shape[1] * t.element_size() % 16:
            return f"rows of {t.shape[1]} {t.dtype}; the kernel copies 16 bytes at a time"
        if torch.is_grad_enabled() and t.requires_grad:
            return "gradients are on, and this operation has none"
    if residual.dtype not in DTYPES:
        return f"residual has dtype {residual.dtype}; the kernel takes float32, bfloat16, float16"
    if torch.is_grad_enabled() and residual.requires_grad:
        return "gradients are on, and this operation has none"
    if x.numel() == 0 or len(x) >= 2**31 - 2**20:
        return f"{len(x)} rows; the kernel takes 1 to 2³¹"
    return None
