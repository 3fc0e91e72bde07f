"""Launches of two LayerNorms in a row."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, block, device_of
from . import block_sizes
from .launches import RowLayout, rows_of, sum_partials
from .triton_twice import layer_norm_twice_backward_kernel, layer_norm_twice_kernel


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    eps: float,
    second_eps: float,
    dtype: torch.dtype,
    *,
    save: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Normalize x [..., C] twice, in ``dtype``.

    Returns:
        The second norm [..., C]; with ``save`` mean and rstd of both norms' rows, [4, M] fp32.
    """
    x, layout = rows_of(x)
    vectors = [t.contiguous() for t in (weight, bias, second_weight, second_bias)]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    stats = None
    if save:
        stats = torch.empty((4, layout.rows), dtype=torch.float32, device=x.device)
    launch = _forward_launch(layout, x.shape[-1], eps, second_eps, device_of(x.device.index))
    launch(x, *vectors, out, stats)
    return out, stats


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    stats: Tensor,
    *,
    need_x: bool,
    sums_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Compute dx [..., C] in x's dtype, and the gradients of all four vectors side by side.

    Args:
        g: gradient of the output.
        stats: as :func:`forward` saved them.
        need_x: whether dx is needed; else it is ``None``.
        sums_dtype: of the vectors' gradients; ``None`` where they are not needed.
    """
    g, g_layout = rows_of(g)
    x, x_layout = rows_of(x)
    width = x.shape[-1]
    device = device_of(x.device.index)
    vectors = [t.contiguous() for t in (weight, bias, second_weight)]
    _, programs = block_sizes.twice_backward_tile(width)
    count = block_sizes.partial_count(x_layout.rows, device, programs, least=12)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    partials = None
    if sums_dtype is not None:
        partials = torch.empty((count, 4 * width), dtype=torch.float32, device=x.device)
    loaded = g.element_size() + x.element_size()
    launch = _backward_launch(g_layout, x_layout, width, loaded, count, device)
    launch(g, x, *vectors, stats, dx, partials)
    if partials is None or sums_dtype is None:
        return dx, None
    return dx, sum_partials(partials, sums_dtype)


@functools.lru_cache(maxsize=4096)
def _forward_launch(
    layout: RowLayout, width: int, eps: float, second_eps: float, device: Device
) -> Launch:
    tile = block_sizes.forward_tile(width)
    return Launch(
        layer_norm_twice_kernel,
        (ceil_div(layout.rows, tile.rows),),
        device,
        (layout.rows, layout.inner, layout.outer_stride),
        (layout.row_stride, width, eps, second_eps, tile.rows, block(width)),
        warps=tile.warps,
    )


@functools.lru_cache(maxsize=4096)
def _backward_launch(
    g_layout: RowLayout, x_layout: RowLayout, width: int, loaded: int, partials: int, device: Device
) -> Launch:
    tile, _ = block_sizes.twice_backward_tile(width)
    stages = block_sizes.stages_for(tile, width, loaded, device)
    return Launch(
        layer_norm_twice_backward_kernel,
        (partials,),
        device,
        (
            g_layout.rows,
            g_layout.inner,
            g_layout.outer_stride,
            x_layout.inner,
            x_layout.outer_stride,
        ),
        (g_layout.row_stride, x_layout.row_stride, width, tile.rows, block(width), stages),
        warps=tile.warps,
    )
