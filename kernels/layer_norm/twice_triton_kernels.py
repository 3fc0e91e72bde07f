"""Triton kernels of two LayerNorms in one pass; imported on first use only.

Rows are split among programs as in :mod:`fastadapt.kernels.layer_norm.triton_kernels`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, block, device_of
from .triton_kernels import (
    Rows,
    Tile,
    forward_tile,
    gradient_behind,
    normalised,
    parts_for,
    reduce,
    row_offsets,
    rows_of,
    stages_for,
)


@triton.jit
def layer_norm_twice_kernel(
    x_ptr,  # [rows, WIDTH]
    weight_ptr,  # [WIDTH], of the first norm
    bias_ptr,
    second_weight_ptr,  # [WIDTH]
    second_bias_ptr,
    out_ptr,  # [rows, WIDTH]
    stats_ptr,  # [4, rows] fp32, mean and 1 / deviation of either norm, or None
    rows,
    inner,
    outer_stride,
    STRIDE: tl.constexpr,  # between rows; a constant, so that the compiler knows its factors
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    SECOND_EPS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    m_r = o_r < rows
    m_c = o_c < WIDTH
    mask = m_r[:, None] & m_c[None, :]
    p_x = x_ptr + row_offsets(o_r, inner, outer_stride, STRIDE)[:, None] + o_c[None, :]
    x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    normal, mean, rstd = normalised(x, mask, WIDTH, EPS)
    y = normal * _vector(weight_ptr, o_c, WIDTH) + _vector(bias_ptr, o_c, WIDTH)
    normal, second_mean, second_rstd = normalised(y, mask, WIDTH, SECOND_EPS)
    y = normal * _vector(second_weight_ptr, o_c, WIDTH) + _vector(second_bias_ptr, o_c, WIDTH)
    offsets = o_r.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
    if stats_ptr is not None:
        count = tl.cast(rows, tl.int64)
        tl.store(stats_ptr + o_r, mean, mask=m_r)
        tl.store(stats_ptr + count + o_r, rstd, mask=m_r)
        tl.store(stats_ptr + 2 * count + o_r, second_mean, mask=m_r)
        tl.store(stats_ptr + 3 * count + o_r, second_rstd, mask=m_r)


@triton.jit
def _vector(p, o_c, WIDTH: tl.constexpr):
    return tl.load(p + o_c, mask=o_c < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def layer_norm_twice_backward_kernel(
    g_ptr,  # [rows, WIDTH]: gradient of the output
    x_ptr,  # [rows, WIDTH]
    weight_ptr,  # [WIDTH], of the first norm
    bias_ptr,
    second_weight_ptr,  # [WIDTH]
    stats_ptr,  # [4, rows]
    dx_ptr,  # [rows, WIDTH] or None
    sums_ptr,  # [programs, 4 * WIDTH] fp32: shares of the gradients of all four vectors; or None
    rows,
    g_inner,
    g_outer_stride,
    x_inner,
    x_outer_stride,
    G_STRIDE: tl.constexpr,  # between rows; a constant, so that the compiler knows its factors
    X_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_c = tl.arange(0, BC)
    m_c = o_c < WIDTH
    weight = _vector(weight_ptr, o_c, WIDTH)
    bias = _vector(bias_ptr, o_c, WIDTH)
    second_weight = _vector(second_weight_ptr, o_c, WIDTH)
    dweight = tl.zeros((BC,), tl.float32)
    dbias = tl.zeros((BC,), tl.float32)
    dsecond_weight = tl.zeros((BC,), tl.float32)
    dsecond_bias = tl.zeros((BC,), tl.float32)
    count = tl.cast(rows, tl.int64)
    for row in tl.range(tl.program_id(0) * BR, rows, tl.num_programs(0) * BR, num_stages=STAGES):
        o_r = row + tl.arange(0, BR)
        m_r = o_r < rows
        mask = m_r[:, None] & m_c[None, :]
        g_rows = row_offsets(o_r, g_inner, g_outer_stride, G_STRIDE)
        x_rows = row_offsets(o_r, x_inner, x_outer_stride, X_STRIDE)
        g = tl.load(g_ptr + g_rows[:, None] + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_rows[:, None] + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + o_r, mask=m_r, other=0.0)
        rstd = tl.load(stats_ptr + count + o_r, mask=m_r, other=0.0)
        second_mean = tl.load(stats_ptr + 2 * count + o_r, mask=m_r, other=0.0)
        second_rstd = tl.load(stats_ptr + 3 * count + o_r, mask=m_r, other=0.0)
        normal = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        y = normal * weight + bias
        second = tl.where(mask, (y - second_mean[:, None]) * second_rstd[:, None], 0.0)
        dy = tl.where(mask, gradient_behind(g * second_weight, second, second_rstd, WIDTH), 0.0)
        if dx_ptr is not None:
            dx = gradient_behind(dy * weight, normal, rstd, WIDTH)
            offsets = o_r.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if sums_ptr is not None:
            dweight += tl.sum(dy * normal, 0)
            dbias += tl.sum(dy, 0)
            dsecond_weight += tl.sum(g * second, 0)
            dsecond_bias += tl.sum(g, 0)
    if sums_ptr is not None:
        p_sums = sums_ptr + tl.program_id(0).to(tl.int64) * (4 * WIDTH) + o_c
        tl.store(p_sums, dweight, mask=m_c)
        tl.store(p_sums + WIDTH, dbias, mask=m_c)
        tl.store(p_sums + 2 * WIDTH, dsecond_weight, mask=m_c)
        tl.store(p_sums + 3 * WIDTH, dsecond_bias, mask=m_c)


def backward_tile(width: int) -> tuple[Tile, int]:
    """The rule, and how many programs a multiprocessor has registers for: no more are launched.

    8 numbers of each row per thread, and four sums of as many beside them: two rows at a time of up
    to 1024 channels, one of more.
    """
    warps = min(16, block(width) // 256 or 1)
    return (Tile(2, warps), 12 // warps) if warps <= 4 else (Tile(1, warps), 16 // warps)


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
    """The second norm [..., C] in ``dtype``; with ``save`` what the backward needs of rows."""
    x, rows = rows_of(x)
    vectors = [t.contiguous() for t in (weight, bias, second_weight, second_bias)]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    stats = None
    if save:
        stats = torch.empty((4, rows.count), dtype=torch.float32, device=x.device)
    run = _forward_launch(rows, x.shape[-1], eps, second_eps, device_of(x.device.index))
    run(x, *vectors, out, stats)
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
    """dx [..., C] in x's dtype, and the gradients of all four vectors side by side.

    Args:
        g: gradient of the output.
        stats: of :func:`forward`.
        need_x: whether dx is asked for; else it is ``None``.
        sums_dtype: of the vectors' gradients; ``None`` where they are not asked for.
    """
    g, g_rows = rows_of(g)
    x, x_rows = rows_of(x)
    width = x.shape[-1]
    device = device_of(x.device.index)
    vectors = [t.contiguous() for t in (weight, bias, second_weight)]
    count = parts_for(x_rows.count, device, backward_tile(width)[1], least=12)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    parts = None
    if sums_dtype is not None:
        parts = torch.empty((count, 4 * width), dtype=torch.float32, device=x.device)
    loaded = g.element_size() + x.element_size()
    run = _backward_launch(g_rows, x_rows, width, loaded, count, device)
    run(g, x, *vectors, stats, dx, parts)
    return dx, None if parts is None else reduce(parts, sums_dtype)


@functools.lru_cache(maxsize=4096)
def _forward_launch(
    rows: Rows, width: int, eps: float, second_eps: float, device: Device
) -> Launch:
    tile = forward_tile(width)
    return Launch(
        layer_norm_twice_kernel,
        (ceil_div(rows.count, tile.rows),),
        device,
        rows[:3],
        (rows.row_stride, width, eps, second_eps, tile.rows, block(width)),
        warps=tile.warps,
    )


@functools.lru_cache(maxsize=4096)
def _backward_launch(
    g_rows: Rows, x_rows: Rows, width: int, loaded: int, parts: int, device: Device
) -> Launch:
    tile, _ = backward_tile(width)
    stages = stages_for(tile, width, loaded, device)
    return Launch(
        layer_norm_twice_backward_kernel,
        (parts,),
        device,
        (*g_rows[:3], *x_rows[1:3]),
        (g_rows.row_stride, x_rows.row_stride, width, tile.rows, block(width), stages),
        warps=tile.warps,
    )
