"""The launch of the norm of shifted rows."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.e4m3 import E4M3
from ..common.launcher import Device, Launch, block, device_of
from ..layer_norm import block_sizes as norm_sizes
from ..layer_norm.launches import RowLayout, rows_of
from .triton_kernels import shifted_norm_kernel


def shifted_norm(
    x: Tensor,
    shift: Tensor | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: float | None = None,
) -> Tensor:
    """Normalize the rows of x [..., C] + shift; with a factor, in e4m3."""
    x, layout = rows_of(x)
    out = torch.empty(x.shape, dtype=x.dtype if factor is None else E4M3, device=x.device)
    vectors = [None if t is None else t.contiguous() for t in (shift, weight, bias)]
    _launch(layout, x.shape[-1], eps, factor or 1.0, device_of(x.device.index))(x, *vectors, out)
    return out


@functools.lru_cache(maxsize=1024)
def _launch(layout: RowLayout, width: int, eps: float, factor: float, device: Device) -> Launch:
    tile = norm_sizes.forward_tile(width)
    return Launch(
        shifted_norm_kernel,
        (ceil_div(layout.rows, tile.rows),),
        device,
        (layout.rows, layout.inner, layout.outer_stride),
        (layout.row_stride, width, eps, factor, tile.rows, block(width)),
        warps=tile.warps,
    )
