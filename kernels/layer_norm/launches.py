"""Launches of LayerNorm, its backward, and the sum over partials."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, block, device_of
from . import block_sizes
from .triton_kernels import layer_norm_backward_kernel, layer_norm_kernel, sum_partials_kernel


class RowLayout(NamedTuple):
    """How rows [M, C] of a tensor lie in memory; the numbers of a row lie side by side.

    Row i begins at ``i // inner * outer_stride + i % inner * row_stride``.
    """

    rows: int
    inner: int
    outer_stride: int
    row_stride: int


class Normalized(NamedTuple):
    """Results of LayerNorm's forward."""

    out: Tensor  # [..., C]
    stats: Tensor | None  # [2, M] fp32: mean and rstd of each row
    total: Tensor | None  # [..., C] in x's dtype: the sum of x and what was added to it


def rows_of(x: Tensor) -> tuple[Tensor, RowLayout]:
    """Return x [..., C] and its rows' layout; copy only where kernels cannot read its strides.

    They can read tokens [B, N, C] without some of the first, and gradients that a mean over tokens
    has expanded.
    """
    width = x.shape[-1]
    count = x.numel() // width
    if not x.is_contiguous():
        if x.dim() == 3 and x.stride(2) == 1:
            return x, RowLayout(count, x.shape[1], x.stride(0), x.stride(1))
        x = x.contiguous()
    return x, RowLayout(count, count, 0, width)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    save: bool = False,
    branch: Tensor | None = None,
    added: Tensor | None = None,
) -> Normalized:
    """Normalize x [..., C], or x + branch, in ``dtype``.

    Args:
        save: keep each row's mean and rstd.
        branch: shaped as x, added before the norm.
        added: [C], added to the sum but not to what is normalized. With it or ``branch``, the sum
            of all is a result as well.
    """
    x, layout = rows_of(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    stats = total = None
    if save:
        stats = torch.empty((2, layout.rows), dtype=torch.float32, device=x.device)
    if added is not None or branch is not None:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    branch, added = (None if t is None else t.contiguous() for t in (branch, added))
    launch = _forward_launch(layout, x.shape[-1], eps, device_of(x.device.index))
    launch(x, weight.contiguous(), bias.contiguous(), out, stats, branch, added, total)
    return Normalized(out, stats, total)


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    *,
    need_x: bool,
    residual: Tensor | None = None,
    partials: Tensor | None = None,
) -> Tensor | None:
    """Compute dx of :func:`forward` [..., C] in x's dtype, ``None`` if it is not needed.

    Args:
        g: gradient of the output.
        stats: mean and rstd, [2, M] fp32.
        residual: contiguous, shaped as x; added to dx.
        partials: [P, at least 2 · C (3 · C with a residual)] fp32, gets P partials of the gradients
            of weight and bias and of the sum of all rows of ``residual``; see
            :func:`sum_partials`.
    """
    g, g_layout = rows_of(g)
    x, x_layout = rows_of(x)
    device = device_of(x.device.index)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    if partials is None:
        count, columns = block_sizes.partial_count(x_layout.rows, device), 0
    else:
        count, columns = partials.shape
    loaded = sum(t.element_size() for t in (g, x, residual) if t is not None)
    launch = _backward_launch(g_layout, x_layout, x.shape[-1], loaded, count, columns, device)
    launch(g, x, weight.contiguous(), stats, residual, dx, partials)
    return dx


def new_partials(x: Tensor, width: int) -> Tensor:
    """Allocate partials [P, width] fp32 of sums over the rows of x."""
    rows = x.numel() // x.shape[-1]
    count = block_sizes.partial_count(rows, device_of(x.device.index))
    return torch.empty((count, width), dtype=torch.float32, device=x.device)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Add partials [P, width] up, each column in the same order every time."""
    out = torch.empty(partials.shape[1], dtype=dtype, device=partials.device)
    _sum_partials_launch(*partials.shape, device_of(partials.device.index))(partials, out)
    return out


@functools.lru_cache(maxsize=4096)
def _forward_launch(layout: RowLayout, width: int, eps: float, device: Device) -> Launch:
    tile = block_sizes.forward_tile(width)
    return Launch(
        layer_norm_kernel,
        (ceil_div(layout.rows, tile.rows),),
        device,
        (layout.rows, layout.inner, layout.outer_stride),
        (layout.row_stride, width, eps, tile.rows, block(width)),
        warps=tile.warps,
    )


@functools.lru_cache(maxsize=4096)
def _backward_launch(
    g_layout: RowLayout,
    x_layout: RowLayout,
    width: int,
    loaded: int,
    partials: int,
    columns: int,
    device: Device,
) -> Launch:
    tile = block_sizes.backward_tile(width)
    return Launch(
        layer_norm_backward_kernel,
        (partials,),
        device,
        (
            g_layout.rows,
            g_layout.inner,
            g_layout.outer_stride,
            x_layout.inner,
            x_layout.outer_stride,
            columns,
        ),
        (
            g_layout.row_stride,
            x_layout.row_stride,
            width,
            tile.rows,
            block(width),
            block_sizes.stages_for(tile, width, loaded, device),
        ),
        warps=tile.warps,
    )


@functools.lru_cache(maxsize=4096)
def _sum_partials_launch(partials: int, width: int, device: Device) -> Launch:
    return Launch(
        sum_partials_kernel,
        (ceil_div(width, 32),),
        device,
        (partials, width),
        (64, 32),
        warps=4,
    )
