"""Which shapes and dtypes the product with patches takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import why_not_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST_NORM = 256  # channels that one program holds


class Norm(NamedTuple):
    """LayerNorm over the channels of the result: vectors [C], and what is added to the variance."""

    weight: Tensor
    bias: Tensor
    eps: float


def check_shapes(x: Tensor, weight: Tensor, table: Tensor, patch: int, norm: Norm | None) -> int:
    """Raise ValueError for shapes that do not fit x [B, H, W, D]; return the number of tokens."""
    if x.dim() != 4 or patch < 1 or x.shape[1] % patch or x.shape[2] % patch:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [B, H, W, D] with sides that are multiples of "
            f"the patch, {patch}"
        )
    depth, patches = patch * patch * x.shape[3], x.shape[1] * x.shape[2] // patch**2
    if weight.dim() != 2 or weight.shape[1] != depth:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [C, {depth}]")
    width = len(weight)
    expected: tuple[int, ...]
    if table.dim() == 1:
        expected, tokens = (width,), patches
    else:
        expected, tokens = (max(len(table), patches), width), max(len(table), patches)
    if tuple(table.shape) != expected:
        raise ValueError(
            f"table has shape {tuple(table.shape)}; expected [C={width}], or [N, C={width}] with "
            f"N={patches} patches or more"
        )
    for name, t in zip(("norm.weight", "norm.bias"), (norm or ())[:2], strict=False):
        if tuple(t.shape) != (width,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}; expected [C={width}]")
    return tokens


def why_not_triton(x: Tensor, weight: Tensor, norm: Norm | None) -> str | None:
    """Say why the kernel cannot take this call; ``None`` if it can."""
    reason = why_not_device(x)
    if reason is not None:
        return reason
    if weight.dtype not in DTYPES or x.dtype not in (torch.uint8, weight.dtype):
        return f"dtypes {x.dtype} and {weight.dtype}; the kernel takes uint8 or the weight's"
    if weight.shape[1] * weight.element_size() % 16:
        return f"patches of {weight.shape[1]} values; the kernel copies 16 bytes at a time"
    if norm is not None and len(weight) > WIDEST_NORM:
        return f"a norm over {len(weight)} channels; the kernel takes up to {WIDEST_NORM}"
    if x.numel() == 0 or x[0].numel() >= 2**31:
        return f"x {tuple(x.shape)}; the kernel takes 1 to 2³¹ values an image"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight)):
        return "gradients are on, and this operation has none"
    return None
