"""Triton kernels between the products of the residual MLP; imported on first use only."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, block, device_of, gluon_box

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TAU = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2π)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)  # exp(−h² / 2) = 2^(−h² · this)
TAIL_SCALE = tl.constexpr(0.3275911)


@triton.jit
def tail(t):
    """Half the complementary error function of z over exp(−z²), for z ≥ 0, t = 1 / (1 +
    ``TAIL_SCALE`` · z): Abramowitz and Stegun 7.1.26."""
    p = t * 0.5307027145 - 0.7265760135
    p = p * t + 0.7107068705
    p = p * t - 0.142248368
    p = p * t + 0.127414796
    return p * t


@triton.jit
def _normal(h, EXACT: tl.constexpr):
    """The normal distribution's integral up to h, and exp(−h² / 2).

    Not ``EXACT``, within 1e-7: :func:`tail`, whose exponential is the second result. The library's
    erf takes twice the instructions, more than the memory leaves time for.
    """
    e = tl.exp2(h * h * -HALF_LOG2_E)
    if EXACT:
        return 0.5 + 0.5 * tl.math.erf(h * SQRT_HALF), e
    t = 1.0 / (1.0 + (TAIL_SCALE * SQRT_HALF) * tl.abs(h))
    beyond = tail(t) * e
    return tl.where(h < 0, beyond, 1.0 - beyond), e


@triton.jit
def gelu_kernel(
    h_ptr,  # [rows, WIDTH]
    bias_ptr,  # [WIDTH]
    out_ptr,  # [rows, WIDTH], may be h: gelu(h + bias)
    slope_ptr,  # [rows, WIDTH], may be h: gelu'(h + bias); or None
    rows,
    WIDTH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    across = tl.cdiv(WIDTH, BC)
    o_r = tl.program_id(0) // across * BR + tl.arange(0, BR)
    o_c = tl.program_id(0) % across * BC + tl.arange(0, BC)
    m_c = o_c < WIDTH
    mask = (o_r < rows)[:, None] & m_c[None, :]
    offsets = o_r.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
    bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    below, e = _normal(h, out_ptr.dtype.element_ty == tl.float32)
    tl.store(out_ptr + offsets, (h * below).to(out_ptr.dtype.element_ty), mask=mask)
    if slope_ptr is not None:
        slope = below + h * e * INVERSE_SQRT_TAU
        tl.store(slope_ptr + offsets, slope.to(slope_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(
    slope_ptr,  # [rows, WIDTH]
    g_ptr,  # [rows, WIDTH]: gradient of GELU's output; becomes that of its input
    sums_ptr,  # [programs of a column, sums_width] fp32: sums of the latter; or None
    rows,
    sums_width,
    first_sum,  # the column of sums where they begin
    WIDTH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < WIDTH
    sums = tl.zeros((BR, BC), tl.float32)
    for row in range(tl.program_id(1) * BR, rows, tl.num_programs(1) * BR):
        o_r = row + tl.arange(0, BR)
        mask = (o_r < rows)[:, None] & m_c[None, :]
        offsets = o_r.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
        slope = tl.load(slope_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * slope
        tl.store(g_ptr + offsets, dh.to(g_ptr.dtype.element_ty), mask=mask)
        if sums_ptr is not None:
            sums += dh  # rows beyond the last have g = 0
    if sums_ptr is not None:
        p_sums = sums_ptr + tl.program_id(1).to(tl.int64) * sums_width + first_sum + o_c
        tl.store(p_sums, tl.sum(sums, 0), mask=m_c)


class Tile(NamedTuple):
    """Launch configuration: the rows and columns of a program at a time, and its warps."""

    rows: int
    cols: int
    warps: int


def gelu_tile(width: int) -> Tile:
    """The rule: 16 numbers per thread, a warp beside the other."""
    cols = min(1024, block(width, 32))
    return Tile(2048 // cols, cols, 4)


def gelu_backward_tile(width: int) -> Tile:
    """The rule: 8 numbers of each tensor per thread, in rows as long as can be."""
    cols = min(1024, block(width, 32))
    return Tile(2048 // cols, cols, 8)


def slope_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which GELU's slope is kept."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def gelu(h: Tensor, bias: Tensor, *, save: bool) -> tuple[Tensor, Tensor | None]:
    """gelu(h + bias) of contiguous h [M, H], which it overwrites; with ``save`` also its slope.

    The slope lies between −0.13 and 1.13, where fp16 is eight times as exact as bf16.
    """
    out = torch.empty_like(h) if save else h
    slope = h.view(slope_dtype(h.dtype)) if save else None
    _gelu_launch(*h.shape, device_of(h.device.index))(h, bias.contiguous(), out, slope)
    return out, slope


def gelu_backward(slope: Tensor, g: Tensor, *, parts: Tensor | None = None, first: int = 0) -> None:
    """Makes g [M, H], the gradient of :func:`gelu`'s output, that of ``h``, in place.

    Args:
        parts: [P, first + H or more] fp32, gets P shares of the sum of all rows of the result, from
            column ``first`` on.
    """
    device = device_of(g.device.index)
    shares, columns = (4 * device.multiprocessors, 0) if parts is None else parts.shape
    _gelu_backward_launch(*g.shape, shares, columns, first, device)(slope, g, parts)


@functools.lru_cache
def _hopper():
    """The kernels for Hopper; ``None`` where this Triton has another Gluon than they need."""
    try:
        from . import hopper_kernels as residual_mlp_gluon
    except (ImportError, AttributeError):
        return None
    return residual_mlp_gluon


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether one kernel multiplies x [M, C] with an MLP's weight and has GELU, too: on Hopper, in
    half precision, with a tile for every multiprocessor."""
    device = device_of(x.device.index)
    if device.major != 9 or x.dtype == torch.float32 or _hopper() is None:
        return False
    width = weight.numel() // x.shape[1]
    if x.shape[1] % 8 or width % 8 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return False
    tiles = ceil_div(len(x), 128) * ceil_div(width, 256)
    return weight.is_contiguous() and x.is_contiguous() and tiles >= device.multiprocessors


def product_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, save: bool
) -> tuple[Tensor, Tensor | None]:
    """gelu(x @ weightᵀ + bias), where :func:`fuses` says so; with ``save`` also GELU's slope.

    Args:
        x: [M, C].
        weight: [H, C].
        bias: [H].
    """
    out = x.new_empty(len(x), len(weight))
    slope = torch.empty_like(out, dtype=torch.float16) if save else None
    sizes = (*x.shape, len(weight))
    device = device_of(x.device.index)
    run, _ = _product_launch(*sizes, x.dtype, bias.dtype, device, save=save)
    run(x, weight, slope, out, bias.contiguous(), None)
    return out, slope


def product_gelu_backward(
    g: Tensor, weight: Tensor, slope: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient of h for ``gelu(h) @ weightᵀ``, where :func:`fuses` says so.

    Args:
        g: [M, C], the gradient of the product.
        weight: [C, H].
        slope: [M, H] fp16, GELU's.
        sums: also shares of the sum over its rows, [P, H] fp32.
    """
    out = torch.empty_like(slope, dtype=g.dtype)
    sizes = (*g.shape, weight.shape[1])
    device = device_of(g.device.index)
    run, units = _product_launch(*sizes, g.dtype, None, device, backward=True, sums=sums)
    shares = g.new_empty(units, sizes[2], dtype=torch.float32) if sums else None
    run(g, weight, slope, out, None, shares)
    return out, shares


@functools.lru_cache(maxsize=4096)
def _product_launch(
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
    """The launch, and how many shares of the sums it leaves."""
    gluon = _hopper()
    down, across = ceil_div(rows, 128), ceil_div(width, 256)
    tiles = down * across
    programs, units = min(tiles, device.multiprocessors), down
    # Programs that keep to their columns add up while they go.
    steady = programs // across * across
    if sums and steady and ceil_div(tiles, steady) == ceil_div(tiles, programs):
        programs, units = steady, steady // across
    hidden, slope = (gluon_box((rows, width), (64, 64), t) for t in (dtype, torch.float16))
    weight = ((depth, width), (64, 256)) if backward else ((width, depth), (256, 64))
    launch = Launch(
        gluon.product_kernel,
        (programs,),
        device,
        (depth, width, tiles, across, units),
        (gluon.Product(backward, save, sums),),
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
    if save:  # its backward's compiles behind it
        _product_launch(rows, depth, width, dtype, None, device, backward=True, sums=True)
    return launch, units


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
    rows: int, width: int, parts: int, columns: int, first: int, device: Device
) -> Launch:
    tile = gelu_backward_tile(width)
    return Launch(
        gelu_backward_kernel,
        (ceil_div(width, tile.cols), parts),
        device,
        (rows, columns, first),
        (width, tile.rows, tile.cols),
        warps=tile.warps,
    )
