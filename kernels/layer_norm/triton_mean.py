"""Triton kernels of LayerNorm with the mean over tokens, equation (1) of :mod:`.op_mean`.

Imported on first use only. A sample's tokens are split among programs, each of which leaves the sum
of its normalized ones; a small kernel adds these partials, always in the same order, and applies
weight and bias.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_kernels import normalize_rows


@triton.jit
def normalized_sum_kernel(
    x_ptr,  # [samples, tokens, WIDTH]
    parts_ptr,  # [samples, parts, WIDTH] fp32: sums of normalized tokens
    stats_ptr,  # [2, samples * tokens] fp32, mean and rstd, or None
    tokens,
    share,  # tokens of a program
    sample_stride,
    STRIDE: tl.constexpr,  # between tokens; a constant, so that the compiler knows its factors
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up the normalized tokens of a part of a sample."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sample = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    o_c = tl.arange(0, BC)
    m_c = o_c < WIDTH
    total = tl.zeros((BC,), tl.float32)
    p_stats = stats_ptr + sample * tokens if stats_ptr is not None else None
    for token in range(first, last, BT):
        o_t = token + tl.arange(0, BT)
        m_t = o_t < last
        mask = m_t[:, None] & m_c[None, :]
        offsets = sample * sample_stride + o_t.to(tl.int64) * STRIDE
        p_x = x_ptr + offsets[:, None] + o_c[None, :]
        x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        normal, mean, rstd = normalize_rows(x, mask, WIDTH, EPS)
        total += tl.sum(normal, 0)
        if stats_ptr is not None:
            tl.store(p_stats + o_t, mean, mask=m_t)
            p_rstd = p_stats + tl.num_programs(0).to(tl.int64) * tokens
            tl.store(p_rstd + o_t, rstd, mask=m_t)
    part = sample * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts_ptr + part * WIDTH + o_c, total, mask=m_c)


@triton.jit
def mean_of_partials_kernel(
    parts_ptr,  # [samples, parts, width] fp32
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    out_ptr,  # [samples, width]
    parts,
    tokens,
    width,
    BP: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add partials up, divide by the tokens, and apply weight and bias."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sample = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < width
    total = tl.zeros((BP, BC), tl.float32)
    for part in range(0, parts, BP):
        o_p = part + tl.arange(0, BP)
        p = parts_ptr + (sample * parts + o_p)[:, None] * width + o_c[None, :]
        total += tl.load(p, mask=(o_p < parts)[:, None] & m_c[None, :], other=0.0)
    weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    y = tl.sum(total, 0) / tokens * weight + bias
    tl.store(out_ptr + sample * width + o_c, y.to(out_ptr.dtype.element_ty), mask=m_c)
