"""The launch of the depthwise convolution with normalisation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.e4m3 import E4M3
from ..common.launcher import Device, Launch, block, device_of
from .block_sizes import StripTile, tile_for
from .triton_kernels import depthwise_norm_kernel


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    tile: StripTile | None = None,
    *,
    dtype: torch.dtype | None = None,
    factor: float | None = None,
) -> Tensor:
    """Convolve and normalize contiguous x [B, H, W, C], with the rule's tile or another."""
    out = torch.empty_like(x, dtype=(dtype or x.dtype) if factor is None else E4M3)
    device = device_of(x.device.index)
    batch, height, width, channels = x.shape
    tile = tile or tile_for((batch, height, width, channels), device)
    dtypes = (x.dtype, weight.dtype, bias.dtype, out.dtype)
    launch = prepare(tuple(x.shape), bias.dim() == 3, eps, tile, dtypes, device, factor)
    launch(x, weight, bias, None, None, out)
    return out


@functools.lru_cache(maxsize=1024)
def prepare(
    shape: tuple[int, ...],
    bias_map: bool,
    eps: float,
    tile: StripTile,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
    device: Device,
    factor: float | None = None,
) -> Launch:
    """Prepare the launch for a size and a tile; the kernel begins to compile."""
    batch, height, width, channels = shape
    across = ceil_div(ceil_div(width, tile.strip), tile.strips)
    return Launch(
        depthwise_norm_kernel,
        (across * ceil_div(height, tile.rows), batch),
        device,
        (height, width),
        (
            channels,
            block(channels),
            tile.strip,
            tile.strips,
            tile.rows,
            bias_map,
            eps,
            factor or 1.0,
        ),
        warps=tile.warps,
        dtypes=(*dtypes[:3], None, None, dtypes[3]),
    )
