"""Triton kernel of self-attention of a packed product: equations (1) to (4) of :mod:`.op`.

Imported on first use only. A program computes some queries of one head of one sample. Keys come in
whole tiles and a last one that holds the rest, as small as the instructions allow, so that few of
the products are with keys that are not there. The softmax is computed as tiles come, with the
largest product so far subtracted (Milakov and Gimelshein 2018; Dao et al. 2022).

Blocks of rows come through descriptors [B, N, 3·H·D], whose rows beyond the last token read as zero
and are not written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def normalize_heads(x, weight_ptr, bias_ptr, D: tl.constexpr, EPS: tl.constexpr):
    """Normalize rows [R, D] over D: equation (1)."""
    o_d = tl.arange(0, D)
    wide = x.to(tl.float32)
    mean = tl.sum(wide, 1) / D
    centered = wide - mean[:, None]
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / D + EPS)
    weight = tl.load(weight_ptr + o_d).to(tl.float32)
    bias = tl.load(bias_ptr + o_d).to(tl.float32)
    return (centered * rstd[:, None] * weight[None, :] + bias[None, :]).to(x.dtype)


@triton.jit
def attend_tile(q, k, v, acc, total, largest, left, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """Add the keys of one tile: equations (2) to (4); of the last tile the first ``left`` keys."""
    s = tl.dot(q, k.T, input_precision="ieee")
    if MASKED:
        o_k = tl.arange(0, k.shape[0])
        s = tl.where((o_k < left)[None, :], s, -float("inf"))
    larger = tl.maximum(largest, tl.max(s, 1))
    p = tl.exp2(s * SCALE - (larger * SCALE)[:, None])
    shrink = tl.exp2((largest - larger) * SCALE)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, larger


@triton.jit
def qkv_attention_kernel(
    q_desc,  # [B, N, 3·H·D], blocks of [1, BQ, D]
    kv_desc,  # the same, blocks of [1, BK, D]
    rest_desc,  # the same, blocks of [1, BR, D]
    out_desc,  # [B, N, H·D], blocks of [1, BQ, D]
    q_weight_ptr,  # [D], or None: no norms
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    tokens,
    heads,
    D: tl.constexpr,
    SCALE: tl.constexpr,  # c · log2(e)
    EPS: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,  # 0: whole tiles hold all keys
    TILES: tl.constexpr,  # whole ones
    UNROLLED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute attention of BQ queries of one head."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = tl.cdiv(tokens, BQ)
    row = tl.program_id(0) % blocks * BQ  # programs that share keys run side by side
    head = tl.program_id(0) // blocks % heads
    sample = tl.program_id(0) // (blocks * heads)
    col, width = head * D, heads * D
    q = q_desc.load([sample, row, col]).reshape([BQ, D])
    if q_weight_ptr is not None:
        q = normalize_heads(q, q_weight_ptr, q_bias_ptr, D, EPS)
    acc = tl.zeros((BQ, D), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    largest = tl.full((BQ,), -float("inf"), tl.float32)
    if UNROLLED:
        for i in tl.static_range(TILES):
            k = kv_desc.load([sample, i * BK, width + col]).reshape([BK, D])
            v = kv_desc.load([sample, i * BK, 2 * width + col]).reshape([BK, D])
            if q_weight_ptr is not None:
                k = normalize_heads(k, k_weight_ptr, k_bias_ptr, D, EPS)
            acc, total, largest = attend_tile(q, k, v, acc, total, largest, BK, SCALE, False)
    else:
        for i in range(TILES):
            k = kv_desc.load([sample, i * BK, width + col]).reshape([BK, D])
            v = kv_desc.load([sample, i * BK, 2 * width + col]).reshape([BK, D])
            if q_weight_ptr is not None:
                k = normalize_heads(k, k_weight_ptr, k_bias_ptr, D, EPS)
            acc, total, largest = attend_tile(q, k, v, acc, total, largest, BK, SCALE, False)
    if BR > 0:
        k = rest_desc.load([sample, TILES * BK, width + col]).reshape([BR, D])
        v = rest_desc.load([sample, TILES * BK, 2 * width + col]).reshape([BR, D])
        if q_weight_ptr is not None:
            k = normalize_heads(k, k_weight_ptr, k_bias_ptr, D, EPS)
        left = tokens - TILES * BK
        acc, total, largest = attend_tile(q, k, v, acc, total, largest, left, SCALE, True)
    out = (acc / total[:, None]).to(out_desc.dtype)
    out_desc.store([sample, row, col], out.reshape([1, BQ, D]))
