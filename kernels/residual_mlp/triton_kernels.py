"""Triton kernels of GELU and its backward, between the products of the residual MLP.

Imported on first use only. For h [M, H], bias b [H], Φ the standard normal distribution's integral
and φ its density:

    (1)  a[m, j]  = t · Φ(t),  t = h[m, j] + b[j]
    (2)  s[m, j]  = Φ(t) + t · φ(t)                        the slope of GELU
    (3)  dh[m, j] = g[m, j] · s[m, j],   db[j] = sum over m of dh[m, j]
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TAU = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2π)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)  # exp(−h² / 2) = 2^(−h² · this)
TAIL_SCALE = tl.constexpr(0.3275911)


@triton.jit
def tail(t):
    """Compute erfc(z) / 2 · exp(z²) for z ≥ 0 from t = 1 / (1 + ``TAIL_SCALE`` · z).

    Source: Abramowitz and Stegun, 7.1.26.
    """
    p = t * 0.5307027145 - 0.7265760135
    p = p * t + 0.7107068705
    p = p * t - 0.142248368
    p = p * t + 0.127414796
    return p * t


@triton.jit
def normal_integral(h, EXACT: tl.constexpr):
    """Compute Φ(h), the normal distribution's integral up to h, and exp(−h² / 2).

    Without ``EXACT`` within 1e-7, by :func:`tail`, whose exponential is the second result. The
    library's erf takes twice the instructions, more than the memory leaves time for.
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
    slope_ptr,  # [rows, WIDTH], may be h: slope of gelu at h + bias; or None
    rows,
    WIDTH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute GELU and its slope: equations (1) and (2)."""
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
    below, e = normal_integral(h, out_ptr.dtype.element_ty == tl.float32)
    tl.store(out_ptr + offsets, (h * below).to(out_ptr.dtype.element_ty), mask=mask)
    if slope_ptr is not None:
        slope = below + h * e * INVERSE_SQRT_TAU
        tl.store(slope_ptr + offsets, slope.to(slope_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(
    slope_ptr,  # [rows, WIDTH]
    g_ptr,  # [rows, WIDTH]: gradient of GELU's output; becomes that of its input
    sums_ptr,  # [programs of a column, sums_width] fp32: partials of its sums; or None
    rows,
    sums_width,
    first_sum,  # the column where these partials begin
    WIDTH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply with the slope and leave partials of the sums: equation (3)."""
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
