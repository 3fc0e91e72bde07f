"""Triton kernels of two LayerNorms in a row, equations (1) to (5) of :mod:`.op_twice`.

Imported on first use only. Rows are split among programs as in :mod:`.triton_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_kernels import normalize_rows, normalize_rows_backward, row_offsets


@triton.jit
def layer_norm_twice_kernel(
    x_ptr,  # [rows, WIDTH]
    weight_ptr,  # [WIDTH], of the first norm
    bias_ptr,
    second_weight_ptr,  # [WIDTH]
    second_bias_ptr,
    out_ptr,  # [rows, WIDTH]
    stats_ptr,  # [4, rows] fp32, mean and rstd of both norms, or None
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
    """Normalize rows twice: equations (1) and (2)."""
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
    normal, mean, rstd = normalize_rows(x, mask, WIDTH, EPS)
    y = normal * _vector(weight_ptr, o_c, WIDTH) + _vector(bias_ptr, o_c, WIDTH)
    normal, second_mean, second_rstd = normalize_rows(y, mask, WIDTH, SECOND_EPS)
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
    sums_ptr,  # [programs, 4 * WIDTH] fp32: partials of the gradients of all four vectors; or None
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
    """Compute dx and partials of the sums: equations (3) to (5)."""
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
        dy = normalize_rows_backward(g * second_weight, second, second_rstd, WIDTH)
        dy = tl.where(mask, dy, 0.0)
        if dx_ptr is not None:
            dx = normalize_rows_backward(dy * weight, normal, rstd, WIDTH)
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
