"""Launches of GELU and its backward."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, device_of
from .block_sizes import gelu_backward_tile, gelu_tile
from .checks import slope_dtype
from .triton_kernels import gelu_backward_kernel, gelu_kernel


def gelu(h: Tensor, bias: Tensor, *, save: bool) -> tuple[Tensor, Tensor | None]:
    """Compute GELU of h + bias for contiguous h [M, H], which is overwritten.

    Returns:
        GELU [M, H] in h's dtype; with ``save`` its slope [M, H] in :func:`~.checks.slope_dtype`.
    """
    out = torch.empty_like(h) if save else h
    slope = h.view(slope_dtype(h.dtype)) if save else None
    _gelu_launch(*h.shape, device_of(h.device.index))(h, bias.contiguous(), out, slope)
    return out, slope


def gelu_backward(
    slope: Tensor, g: Tensor, *, partials: Tensor | None = None, first: int = 0
) -> None:
    """Multiply g [M, H], the gradient of :func:`gelu`'s output, with the slope, in place.

    Args:
        partials: [P, first + H or more] fp32, gets P partials of the sum of all rows of the result,
            from column ``first`` on.
    """
    device = device_of(g.device.index)
    if partials is None:
        count, columns = 4 * device.multiprocessors, 0
    else:
        count, columns = partials.shape
    _gelu_backward_launch(*g.shape, count, columns, first, device)(slope, g, partials)


@functools.lru_cache(maxsize=4096)
def _gelu_launch(rows: int, width: int, device: Device) -> Launch:
    tile = gelu_tile(width)
    return Launch(
        gelu_kernel,
        (ceil_div(rows, tile.rows) * ceil_div(width, tile.cols),),
        device,
        (rows,),
        (width, tile.rows, tile.cols),
        warps=tile.warps,
    )


@functools.lru_cache(maxsize=4096)
def _gelu_backward_launch(
    rows: int, width: int, partials: int, columns: int, first: int, device: Device
) -> Launch:
    tile = gelu_backward_tile(width)
    return Launch(
        gelu_backward_kernel,
        (ceil_div(width, tile.cols), partials),
        device,
        (rows, columns, first),
        (width, tile.rows, tile.cols),
        warps=tile.warps,
    )
