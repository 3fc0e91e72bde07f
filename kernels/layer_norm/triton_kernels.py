"""Triton kernels of LayerNorm, equations (1) to (7) of :mod:`.op`.

Imported on first use only. Each kernel reads and writes every number once. Of P programs of the
backward each takes every P-th group of rows, so that it can accumulate its partials of the
parameters' gradients in registers; a small kernel adds the P partials, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.reductions import sum_parts


@triton.jit
def row_offsets(row, inner, outer_stride, row_stride):
    """Compute where rows begin: row i is row ``i % inner`` of the outer index ``i // inner``."""
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * row_stride


@triton.jit
def normalize_rows(x, mask, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Normalize rows [BR, BC], with 0 outside the mask, and return their mean and rstd as well."""
    # Divided before the sum: the compiler would fuse a division after it with the subtraction
    # wherever the mean itself is not stored, and round in another way there.
    mean = tl.sum(x * (1 / WIDTH), 1)
    centered = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / WIDTH + EPS)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def normalize_rows_backward(g, normal, rstd, WIDTH: tl.constexpr):
    """Compute the gradient of rows from the gradient g of the normalized ones."""
    along = tl.sum(g * normal, 1) / WIDTH
    level = tl.sum(g, 1) / WIDTH
    return (g - normal * along[:, None] - level[:, None]) * rstd[:, None]


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [rows, WIDTH]
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH]
    out_ptr,  # [rows, WIDTH]
    stats_ptr,  # [2, rows] fp32, mean and rstd, or None
    branch_ptr,  # [rows, WIDTH] or None: added to x first
    added_ptr,  # [WIDTH] or None
    sum_ptr,  # [rows, WIDTH]: x + branch + added, or None
    rows,
    inner,
    outer_stride,
    STRIDE: tl.constexpr,  # between rows; a constant, so that the compiler knows its factors
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Normalize x, or x + branch: equations (1) to (4)."""
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
    offsets = o_r.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
    if branch_ptr is not None:
        x += tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    normal, mean, rstd = normalize_rows(x, mask, WIDTH, EPS)
    y = normal * weight[None, :] + bias[None, :]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
    if stats_ptr is not None:
        tl.store(stats_ptr + o_r, mean, mask=m_r)
        tl.store(stats_ptr + tl.cast(rows, tl.int64) + o_r, rstd, mask=m_r)
    if sum_ptr is not None:
        total = x
        if added_ptr is not None:
            total += tl.load(added_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        tl.store(sum_ptr + offsets, total.to(sum_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_backward_kernel(
    g_ptr,  # [rows, WIDTH]: gradient of the output
    x_ptr,  # [rows, WIDTH]
    weight_ptr,  # [WIDTH]
    stats_ptr,  # [2, rows]
    residual_ptr,  # [rows, WIDTH], contiguous, or None: added to dx
    dx_ptr,  # [rows, WIDTH] or None
    sums_ptr,  # [programs, sums_width] fp32: partials of g · n, g, residual; or None
    rows,
    g_inner,
    g_outer_stride,
    x_inner,
    x_outer_stride,
    sums_width,
    G_STRIDE: tl.constexpr,  # between rows; a constant, so that the compiler knows its factors
    X_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute dx and partials of the sums: equations (5) to (7)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_c = tl.arange(0, BC)
    m_c = o_c < WIDTH
    weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    dweight = tl.zeros((BC,), tl.float32)
    dbias = tl.zeros((BC,), tl.float32)
    dresidual = tl.zeros((BC,), tl.float32)
    # The next rows are loaded while these are computed, where STAGES is more than 1.
    for row in tl.range(tl.program_id(0) * BR, rows, tl.num_programs(0) * BR, num_stages=STAGES):
        o_r = row + tl.arange(0, BR)
        m_r = o_r < rows
        mask = m_r[:, None] & m_c[None, :]
        g_rows = row_offsets(o_r, g_inner, g_outer_stride, G_STRIDE)
        x_rows = row_offsets(o_r, x_inner, x_outer_stride, X_STRIDE)
        g = tl.load(g_ptr + g_rows[:, None] + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_rows[:, None] + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + o_r, mask=m_r, other=0.0)
        rstd = tl.load(stats_ptr + tl.cast(rows, tl.int64) + o_r, mask=m_r, other=0.0)
        offsets = o_r.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normal = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        if dx_ptr is not None:
            dx = normalize_rows_backward(g * weight[None, :], normal, rstd, WIDTH)
            if residual_ptr is not None:
                dx += residual
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if sums_ptr is not None:
            dweight += tl.sum(g * normal, 0)
            dbias += tl.sum(g, 0)
            if residual_ptr is not None:
                dresidual += tl.sum(residual, 0)
    if sums_ptr is not None:
        p_sums = sums_ptr + tl.program_id(0).to(tl.int64) * sums_width + o_c
        tl.store(p_sums, dweight, mask=m_c)
        tl.store(p_sums + WIDTH, dbias, mask=m_c)
        if residual_ptr is not None:
            tl.store(p_sums + 2 * WIDTH, dresidual, mask=m_c)


@triton.jit
def sum_partials_kernel(
    parts_ptr,  # [parts, width] fp32
    out_ptr,  # [width]
    parts,
    width,
    BP: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add partials up, each column in the same order every time."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    sum_parts(parts_ptr, out_ptr, parts, width, o_c, BP, BC)
