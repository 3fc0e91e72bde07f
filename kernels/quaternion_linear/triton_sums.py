"""Triton kernels of column sums, and of the sum over split-K partials."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.reductions import sum_parts


@triton.jit(do_not_specialize=["rows", "rows_per_split"])
def column_sums_kernel(
    g_ptr,  # [M, N]
    sums_ptr,  # [splits, N] fp32
    rows,
    width,
    g_m,
    g_n,
    rows_per_split,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sum the columns of each split of the rows."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, rows)
    o_m = start + tl.arange(0, BM)
    p_g = g_ptr + o_m[:, None].to(tl.int64) * g_m + o_n[None, :].to(tl.int64) * g_n
    sums = tl.zeros((BM, BN), tl.float32)
    for m in range(start, end, BM):
        m_g = (tl.arange(0, BM) < end - m)[:, None] & (o_n < width)[None, :]
        sums += tl.load(p_g, mask=m_g, other=0.0).to(tl.float32)
        p_g += tl.cast(g_m, tl.int64) * BM
    tl.store(sums_ptr + split * width + o_n, tl.sum(sums, 0), mask=o_n < width)


@triton.jit(do_not_specialize=["a_splits", "b_splits"])
def sum_partials_pair_kernel(
    a_ptr,  # [a_splits, a_count] fp32
    a_out_ptr,  # [a_count]
    b_ptr,  # [b_splits, b_count] fp32, or None
    b_out_ptr,
    a_count,
    b_count,
    a_splits,
    b_splits,
    A_AT_ONCE: tl.constexpr,
    A_BLOCK: tl.constexpr,
    B_AT_ONCE: tl.constexpr,
    B_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the partials of one or two results, in a fixed order."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.program_id(0).to(tl.int64)
    a_blocks = tl.cdiv(a_count, A_BLOCK)
    if b_ptr is None or block < a_blocks:
        o_a = block * A_BLOCK + tl.arange(0, A_BLOCK)
        sum_parts(a_ptr, a_out_ptr, a_splits, a_count, o_a, A_AT_ONCE, A_BLOCK)
    else:
        o_b = (block - a_blocks) * B_BLOCK + tl.arange(0, B_BLOCK)
        sum_parts(b_ptr, b_out_ptr, b_splits, b_count, o_b, B_AT_ONCE, B_BLOCK)
