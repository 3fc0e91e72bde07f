"""Triton kernels of the forward of cluster attention; two of them serve the backward, too.

Channel mode, in the compute dtype unless noted, with x [B, N, C]:

(1)  project     h   = x @ downᵀ + down_bias                        [B·N, R]
                 sums of x over the tokens of each sample           fp32
(2)  attend      q   = mean over tokens of x                        [B, C]    fp32
                 s   = normalize(q) @ normalize(centers)            [B, K]    fp32
                 a   = softmax(s)                                   [B, K]    fp32
(3)  mix         T_b = sum_k a[b, k] · transforms[k]                [B, R, R]
(4)  transform   z   = h @ T_b, kept for the gradient of up         [B·N, R]
                 y   = z @ upᵀ + up_bias, while z is on chip        [B·N, C]

The backward launches (1) with up transposed for gz, and (4) for gh = gz @ T_bᵀ and for
dx = gh @ down + dq / N; see :mod:`fastadapt.kernels.cluster_attention.triton_backward`.

Rows are tiled over all B·N tokens: tiles for each sample would pad 196 tokens to 256. A tile that
straddles samples is loaded once for each of them through a [B, N, R] descriptor, whose out-of-range
rows read as zero, and the products add up. A tile's rows come in two parts, since a block's height
is a power of two: 128 + 64 rows, say.

On Hopper and newer a kernel is launched while the one before runs (programmatic dependent launch)
and waits for its end; what it reads before that are parameters and, in the backward, what the
forward saved. These have been written by then: `project`, with which a pass begins, waits before it
lets the next be launched, and where PyTorch's products come first, those wait for all before them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_helpers import NORM_EPS, load_centers, sample_of_row, state_pointers


@triton.jit
def project_kernel(
    x0_desc,  # [rows, C], blocks of [BM0, BK]
    x1_desc,  # the same, blocks of [BM1, BK]
    w_desc,  # [R, C] or, transposed, [C, R]
    out0_desc,  # [rows, R], blocks of [BM0, BN]
    out1_desc,
    bias_ptr,  # [R]
    sums_ptr,  # [tiles, slots, C] fp32: column sums of each sample's rows within the tile
    rows,
    width,
    rank,
    tokens,
    slots,
    BM0: tl.constexpr,
    BM1: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute (1): rows times a weight, plus a bias, and sums of the rows for each sample."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.program_id(0)
    col = tl.program_id(1) * BN
    row = tile * (BM0 + BM1)
    first = row // tokens
    o_s = tl.arange(0, BS)
    dtype = out0_desc.dtype
    # Summing rows is a product with the one-hot matrix "row belongs to the tile's s-th sample".
    hot0 = sample_of_row(row, first, tokens, BM0, BS).to(dtype)
    acc0 = tl.zeros((BM0, BN), tl.float32)
    if BM1 > 0:
        hot1 = sample_of_row(row + BM0, first, tokens, BM1, BS).to(dtype)
        acc1 = tl.zeros((BM1, BN), tl.float32)
    # The samples in this tile; the first column of programs writes their sums, the others none.
    present = (tl.minimum(row + BM0 + BM1, rows) - 1) // tokens - first + 1
    present = tl.where(col == 0, present, 0)
    if SUMS:
        p_sums = sums_ptr + (tile.to(tl.int64) * slots + o_s[None, :]) * width
        m_sums = o_s[None, :] < present
    for k in range(0, width, BK):
        x0 = x0_desc.load([row, k])
        w = w_desc.load([k, col]) if TRANSPOSED else w_desc.load([col, k]).T
        acc0 = tl.dot(x0, w, acc0)
        if BM1 > 0:
            x1 = x1_desc.load([row + BM0, k])
            acc1 = tl.dot(x1, w, acc1)
        if SUMS:
            sums = tl.dot(x0.T, hot0)
            if BM1 > 0:
                sums = tl.dot(x1.T, hot1, sums)
            o_k = k + tl.arange(0, BK)
            tl.store(p_sums + o_k[:, None], sums, mask=m_sums & (o_k[:, None] < width))
    if BIAS:
        o_n = col + tl.arange(0, BN)
        bias = tl.load(bias_ptr + o_n, mask=o_n < rank, other=0.0).to(tl.float32)[None, :]
        acc0 += bias
        if BM1 > 0:
            acc1 += bias
    out0_desc.store([row, col], acc0.to(dtype))
    if BM1 > 0:
        out1_desc.store([row + BM0, col], acc1.to(dtype))


@triton.jit
def attend_kernel(
    sums_ptr,  # [tiles, slots, C]
    centers_ptr,  # [C, K]
    state_ptr,  # fp32: a [B, K], s [B, K], q [B, C], |q| [B], |centers| [K]
    batch,
    tokens,
    width,
    tile_rows,
    slots,
    num_centers: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # BC >= C
    PDL: tl.constexpr,
):
    """Compute (2): one program for each sample, which writes its part of the packed state."""
    if PDL:
        gdc_launch_dependents()
    sample = tl.program_id(0)
    s_ptr, q_ptr, q_norm_ptr, c_norm_ptr = state_pointers(state_ptr, batch, width, num_centers)
    o_k = tl.arange(0, BK)
    m_k = o_k < num_centers
    c_square = tl.zeros((BK,), tl.float32)
    if ONE_BLOCK:
        # A parameter: nothing that still runs writes it, so the load need not wait.
        centers = load_centers(centers_ptr, 0, width, num_centers, BC, BK)
        c_square += tl.sum(centers * centers, 0)
    if PDL:
        gdc_wait()
    first = sample * tokens // tile_rows
    tiles = (sample * tokens + tokens - 1) // tile_rows - first + 1
    dots = tl.zeros((BK,), tl.float32)
    q_square = tl.zeros((BC,), tl.float32)
    for c in range(0, width, BC):
        if not ONE_BLOCK:
            centers = load_centers(centers_ptr, c, width, num_centers, BC, BK)
            c_square += tl.sum(centers * centers, 0)
        o_c = c + tl.arange(0, BC)
        m_c = o_c < width
        q = tl.zeros((BC,), tl.float32)
        for t in range(0, tiles, BT):
            o_t = t + tl.arange(0, BT)
            slot = sample - (first + o_t) * tile_rows // tokens
            p_q = ((first + o_t).to(tl.int64) * slots + slot) * width
            m_q = (o_t < tiles)[:, None] & m_c[None, :]
            q += tl.sum(tl.load(sums_ptr + p_q[:, None] + o_c[None, :], mask=m_q, other=0.0), 0)
        q = tl.div_rn(q, tl.cast(tokens, tl.float32))
        tl.store(q_ptr + sample.to(tl.int64) * width + o_c, q, mask=m_c)
        dots += tl.sum(q[:, None] * centers, 0)
        q_square += q * q
    q_norm = tl.sqrt_rn(tl.sum(q_square, 0))
    c_norm = tl.sqrt_rn(c_square)
    s = tl.div_rn(dots, tl.maximum(q_norm, NORM_EPS) * tl.maximum(c_norm, NORM_EPS))
    e = tl.where(m_k, tl.exp(s - 1.0), 0.0)  # a cosine: 1 bounds it, no running maximum needed
    o_a = sample.to(tl.int64) * num_centers + o_k
    # Rounded properly: one center gets exactly 1, and its gradient is exactly 0.
    tl.store(state_ptr + o_a, tl.div_rn(e, tl.sum(e, 0)), mask=m_k)
    tl.store(s_ptr + o_a, s, mask=m_k)
    tl.store(q_norm_ptr + sample, q_norm)
    if sample == 0:
        tl.store(c_norm_ptr + o_k, c_norm, mask=m_k)


@triton.jit
def _dot_split(a, b, acc):
    """Compute a @ b with an fp32 ``a`` split in two of b's dtype: its high bits and the rest."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    high = a.to(b.dtype)
    low = (a - high.to(tl.float32)).to(b.dtype)
    return tl.dot(low, b, tl.dot(high, b, acc))


@triton.jit
def mix_kernel(
    a_ptr,  # [B, K] fp32
    transforms_ptr,  # [K, size]
    mixed_ptr,  # [B, size]
    mixed_desc,  # the same, blocks of [BB, BS], or None if its rows are not aligned
    batch,
    num_centers,
    size,
    BB: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute (3) for all samples, as the product of [B, K] with [K, R·R]."""
    if PDL:
        gdc_launch_dependents()
    o_s = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    o_b = tl.program_id(1) * BB + tl.arange(0, BB)
    o_k = tl.arange(0, BK)
    m_s = o_s[None, :] < size
    m_k = o_k < num_centers
    dtype = mixed_ptr.dtype.element_ty
    p_t = transforms_ptr + o_k[:, None].to(tl.int64) * size + o_s[None, :]
    t = tl.load(p_t, mask=m_k[:, None] & m_s, other=0.0).to(dtype)
    if PDL:
        gdc_wait()
    p_a = a_ptr + o_b[:, None].to(tl.int64) * num_centers + o_k[None, :]
    a = tl.load(p_a, mask=(o_b[:, None] < batch) & m_k[None, :], other=0.0)
    mixed = _dot_split(a, t, tl.zeros((BB, BS), tl.float32))
    if mixed_desc is None:
        p_m = mixed_ptr + o_b[:, None].to(tl.int64) * size + o_s[None, :]
        tl.store(p_m, mixed.to(dtype), mask=(o_b[:, None] < batch) & m_s)
    else:
        mixed_desc.store([tl.program_id(1) * BB, tl.program_id(0) * BS], mixed.to(dtype))


@triton.jit
def _transform_rows(
    h_desc,
    t_desc,
    row,
    rows,
    tokens,
    rank,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Multiply rows [row, row + BM) of h with their samples' T_b (or T_bᵀ): [BM, BR] fp32."""
    first = row // tokens
    last = (tl.minimum(row + BM, rows) - 1) // tokens
    steps = tl.cdiv(rank, BK)
    acc = tl.zeros((BM, BR), tl.float32)
    for i in range((last - first + 1) * steps):
        sample = first + i // steps
        k = (i % steps) * BK
        h = h_desc.load([sample, row - sample * tokens, k]).reshape(BM, BK)
        if TRANSPOSED:
            t = t_desc.load([sample, 0, k]).reshape(BR, BK).T
        else:
            t = t_desc.load([sample, k, 0]).reshape(BK, BR)
        acc = tl.dot(h, t, acc)
    return acc


@triton.jit
def transform_kernel(
    h0_desc,  # [B, N, R], blocks of [1, BM0, BK]; without MIX [rows, R], blocks of [BM0, BR]
    h1_desc,
    t_desc,  # [B, R, R]
    w_desc,  # [C, R] or, transposed, [R, C]
    z0_desc,  # [rows, R], blocks of [BM0, BR]
    z1_desc,
    y0_desc,  # [rows, C], blocks of [BM0, BC]
    y1_desc,
    bias_ptr,  # [C], or with ROW_BIAS [B, C]
    sums_ptr,  # [tiles, R] fp32: column sums of z
    rows,
    tokens,
    rank,
    width,
    cols_per_program,
    BM0: tl.constexpr,
    BM1: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    MIX: tl.constexpr,  # z = h @ T_b, or z = h
    T_TRANSPOSED: tl.constexpr,
    STORE_Z: tl.constexpr,
    UP: tl.constexpr,  # y = z @ w + bias
    W_TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    ROW_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    PREFETCH: tl.constexpr,  # y's columns are one block: its weights are loaded at once
    PDL: tl.constexpr,
):
    """Compute (4), or one of its parts."""
    if PDL:
        gdc_launch_dependents()
    start = tl.program_id(1) * cols_per_program
    if PREFETCH:
        w = w_desc.load([0, start]) if W_TRANSPOSED else w_desc.load([start, 0]).T
    if PDL:
        gdc_wait()
    tile = tl.program_id(0)
    row0 = tile * (BM0 + BM1)
    row1 = row0 + BM0
    dtype = h0_desc.dtype
    if MIX:
        acc0 = _transform_rows(h0_desc, t_desc, row0, rows, tokens, rank, BM0, BR, BK, T_TRANSPOSED)
        if SUMS:
            sums = tl.sum(acc0, 0)
        z0 = acc0.to(dtype)
        if STORE_Z:
            z0_desc.store([row0, 0], z0)
        if BM1 > 0:
            acc1 = _transform_rows(
                h1_desc, t_desc, row1, rows, tokens, rank, BM1, BR, BK, T_TRANSPOSED
            )
            if SUMS:
                sums += tl.sum(acc1, 0)
            z1 = acc1.to(dtype)
            if STORE_Z:
                z1_desc.store([row1, 0], z1)
        if SUMS:
            o_r = tl.arange(0, BR)
            tl.store(sums_ptr + tile.to(tl.int64) * rank + o_r, sums, mask=o_r < rank)
    else:
        z0 = h0_desc.load([row0, 0])
        if BM1 > 0:
            z1 = h1_desc.load([row1, 0])
    if UP:
        if ROW_BIAS:
            samples = rows // tokens
            first = row0 // tokens
            o_s = tl.arange(0, BS)
            hot0 = sample_of_row(row0, first, tokens, BM0, BS).to(dtype)
            if BM1 > 0:
                hot1 = sample_of_row(row1, first, tokens, BM1, BS).to(dtype)
        for c in range(start, tl.minimum(start + cols_per_program, width), BC):
            if not PREFETCH:
                w = w_desc.load([0, c]) if W_TRANSPOSED else w_desc.load([c, 0]).T
            o_c = c + tl.arange(0, BC)
            y0 = tl.zeros((BM0, BC), tl.float32)
            if BM1 > 0:
                y1 = tl.zeros((BM1, BC), tl.float32)
            if ROW_BIAS:
                m_b = (first + o_s < samples)[:, None] & (o_c < width)[None, :]
                p_b = bias_ptr + (first + o_s)[:, None].to(tl.int64) * width + o_c[None, :]
                bias = tl.load(p_b, mask=m_b, other=0.0).to(dtype)
                y0 = tl.dot(hot0, bias, y0)
                if BM1 > 0:
                    y1 = tl.dot(hot1, bias, y1)
            y0 = tl.dot(z0, w, y0)
            if BM1 > 0:
                y1 = tl.dot(z1, w, y1)
            if BIAS:
                bias = tl.load(bias_ptr + o_c, mask=o_c < width, other=0.0).to(tl.float32)[None, :]
                y0 += bias
                if BM1 > 0:
                    y1 += bias
            y0_desc.store([row0, c], y0.to(dtype))
            if BM1 > 0:
                y1_desc.store([row1, c], y1.to(dtype))
