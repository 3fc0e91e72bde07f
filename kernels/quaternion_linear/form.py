"""What a quaternion layer computes, and how its tensors lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """What a layer computes, beside the number of rows."""

    inputs: int  # I
    outputs: int  # O
    groups: int | None
    rotation: bool
    scale: bool
    zero_half: bool
    dtype: torch.dtype
    weight_dtype: torch.dtype
    ieee: bool  # fp32 without TF32


class GroupLayout(NamedTuple):
    """How a tensor [G, M, width] lies in memory."""

    groups: int
    rows: int
    group_stride: int
    row_stride: int
    col_stride: int


def form_of(
    x: Tensor, weights: Sequence[Tensor], scale: Tensor | None, rotation: bool, zero_half: bool
) -> Form:
    """Return the form of a call; arguments as for ``quaternion_linear``."""
    *groups, inputs, outputs = weights[0].shape
    return Form(
        inputs,
        outputs,
        groups[0] if groups else None,
        rotation,
        scale is not None,
        zero_half,
        x.dtype,
        weights[0].dtype,
        x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32,
    )


def grouped(x: Tensor, groups: int | None) -> tuple[Tensor, GroupLayout]:
    """View x [..., width] as [G, M, width]; copy only where its strides allow no view."""
    width = x.shape[-1]
    g = groups or 1
    m = x.numel() // (g * width)
    if x.is_contiguous():
        return x, GroupLayout(g, m, 0 if groups is None else m * width, width, 1)
    x = x.reshape(m, width) if groups is None else x.reshape(g, m, width)
    return x, GroupLayout(g, m, 0 if groups is None else x.stride(0), x.stride(-2), x.stride(-1))
