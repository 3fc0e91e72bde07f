"""Triton kernel of the product with patches: equations (1) to (3) of :mod:`.op`.

Imported on first use only. The matrix of patches never exists: a program finds each value of its
rows in the image, where P · D of them lie side by side, and converts it on its way to the product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..layer_norm.triton_kernels import normalize_rows


@triton.jit
def patch_embedding_kernel(
    x_ptr,  # [B, H, W, D]
    w_desc,  # [WIDTH, DEPTH], blocks of [BN, BK]
    table_ptr,  # [tokens, WIDTH] or, without BY_TOKEN, [WIDTH]
    out_ptr,  # [rows, WIDTH]
    norm_weight_ptr,  # [WIDTH], or None: no norm
    norm_bias_ptr,
    rows,
    tokens,
    prefix,  # tokens of an image before its patches
    height,
    width,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BYTES: tl.constexpr,
    EPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute BM tokens of BN channels."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    across: tl.constexpr = (WIDTH + BN - 1) // BN
    o_m = tl.program_id(0) // across * BM + tl.arange(0, BM)
    col = tl.program_id(0) % across * BN
    token = o_m % tokens
    f = token - prefix
    m_m = (o_m < rows) & (f >= 0)
    grid = width // P
    corner = (f // grid * width + f % grid) * (P * D)
    p_x = x_ptr + (o_m // tokens).to(tl.int64) * (height * width * D) + corner
    # Channels by tokens: the converted image is the right operand, which lies in shared memory. The
    # left one would lie in registers, which Triton 3.6 overwrites while products still read them.
    acc = tl.zeros((BN, BM), tl.float32)
    dtype: tl.constexpr = w_desc.dtype
    for k in range(0, DEPTH, BK):
        o_k = k + tl.arange(0, BK)
        place = o_k // (P * D) * (width * D) + o_k % (P * D)
        mask = m_m[:, None] & (o_k < DEPTH)[None, :]
        a = tl.load(p_x[:, None] + place[None, :], mask=mask, other=0)
        if BYTES:
            # Masked values meet weights that are zero, or rows that are not kept.
            a = (a.to(tl.float32) - 128.0).to(dtype)
        w = w_desc.load([col, k])
        acc = tl.dot(w, a.T, acc, input_precision="ieee")
    acc = acc.T
    o_n = col + tl.arange(0, BN)
    m_n = o_n < WIDTH
    mask = (o_m < rows)[:, None] & m_n[None, :]
    acc = tl.where((f >= 0)[:, None], acc, 0.0)
    if BY_TOKEN:
        p_table = table_ptr + token[:, None] * WIDTH + o_n[None, :]
        acc += tl.load(p_table, mask=mask, other=0.0).to(tl.float32)
    else:
        acc += tl.load(table_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if norm_weight_ptr is not None:
        acc, _, _ = normalize_rows(acc, mask, WIDTH, EPS)
        weight = tl.load(norm_weight_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
        acc = acc * weight[None, :] + bias[None, :]
    p_out = out_ptr + o_m.to(tl.int64)[:, None] * WIDTH + o_n[None, :]
    tl.store(p_out, acc.to(dtype), mask=mask)
