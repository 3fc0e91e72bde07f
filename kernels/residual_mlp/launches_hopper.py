"""Launches of Hopper's kernel: a product with GELU, or with its slope, in the epilogue."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.hopper import hopper_kernels
from ..common.launcher import Device, Launch, device_of, gluon_box

TILE_ROWS, TILE_COLS = 128, 256  # of the result, as the kernel computes it


def takes(x: Tensor, weight: Tensor) -> bool:
    """Say whether the kernel takes the product of x [M, C] with an MLP's weight.

    It does on Hopper, in half precision, where every multiprocessor gets a tile.
    """
    device = device_of(x.device.index)
    if not device.has_warp_group_products or hopper_kernels("residual_mlp") is None:
        return False
    if x.dtype == torch.float32:
        return False
    width = weight.numel() // x.shape[1]
    if x.shape[1] % 8 or width % 8 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return False
    tiles = ceil_div(len(x), TILE_ROWS) * ceil_div(width, TILE_COLS)
    return weight.is_contiguous() and x.is_contiguous() and tiles >= device.multiprocessors


def product_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, save: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute gelu(x @ weightᵀ + bias), where :func:`takes` says so.

    Args:
        x: [M, C].
        weight: [H, C].
        bias: [H].
        save: keep GELU's slope as well.

    Returns:
        [M, H]; the slope [M, H] fp16 or ``None``.
    """
    out = x.new_empty(len(x), len(weight))
    slope = torch.empty_like(out, dtype=torch.float16) if save else None
    device = device_of(x.device.index)
    launch, _ = _launch(*x.shape, len(weight), x.dtype, bias.dtype, device, save=save)
    launch(x, weight, slope, out, bias.contiguous(), None)
    return out, slope


def product_gelu_backward(
    g: Tensor, weight: Tensor, slope: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute the gradient of h for ``gelu(h) @ weightᵀ``, where :func:`takes` says so.

    Args:
        g: [M, C], the gradient of the product.
        weight: [C, H].
        slope: [M, H] fp16, GELU's.
        sums: also compute partials of the sum over the result's rows.

    Returns:
        [M, H]; the partials [P, H] fp32 or ``None``.
    """
    out = torch.empty_like(slope, dtype=g.dtype)
    width = weight.shape[1]
    device = device_of(g.device.index)
    launch, units = _launch(*g.shape, width, g.dtype, None, device, backward=True, sums=sums)
    partials = g.new_empty(units, width, dtype=torch.float32) if sums else None
    launch(g, weight, slope, out, None, partials)
    return out, partials


@functools.lru_cache(maxsize=4096)
def _launch(
    rows: int,
    depth: int,
    width: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    device: Device,
    *,
    backward: bool = False,
    save: bool = False,
    sums: bool = False,
) -> tuple[Launch, int]:
    """Prepare the kernel, and count the partials of the sums that it leaves."""
    kernels = hopper_kernels("residual_mlp")
    assert kernels is not None  # else nothing would be taken
    down, across = ceil_div(rows, TILE_ROWS), ceil_div(width, TILE_COLS)
    tiles = down * across
    programs, units = min(tiles, device.multiprocessors), down
    # Programs that keep to their columns accumulate from tile to tile.
    steady = programs // across * across
    if sums and steady and ceil_div(tiles, steady) == ceil_div(tiles, programs):
        programs, units = steady, steady // across
    hidden, slope = (gluon_box((rows, width), (64, 64), t) for t in (dtype, torch.float16))
    weight = ((depth, width), (64, 256)) if backward else ((width, depth), (256, 64))
    launch = Launch(
        kernels.product_gelu_kernel,
        (programs,),
        device,
        (depth, width, tiles, across, units),
        (kernels.ProductGelu(backward, save, sums),),
        warps=4,
        tensors=(
            (0, gluon_box((rows, depth), (64, 64), dtype)),
            (1, gluon_box(*weight, dtype)),
            (2, slope) if save or backward else None,
            (3, hidden),
            None if backward else (4, None),
            (5, None) if sums else None,
        ),
        dtypes=(dtype, dtype, torch.float16, dtype, bias_dtype, torch.float32),
    )
    if save:  # the kernel of its backward compiles after it, before it is needed
        _launch(rows, depth, width, dtype, None, device, backward=True, sums=True)
    return launch, units
