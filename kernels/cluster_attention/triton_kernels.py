"""Triton kernels of cluster attention; imported on first use only.

Forward, channel mode (names as in ``cluster_attention``; h = x @ downᵀ + down_bias):

    project     h, and on the side the sums of x over the tokens of each sample
    attend      q, cosine similarities, softmax: one program per sample
    mix         T_b for all samples, a [B, K] @ [K, R·R] product
    transform   z = h @ T_b (kept for dup) and, while it is on chip, y = z @ upᵀ + up_bias

Backward (g = dy):

    project     gz = g @ up, and the sum of g over all rows (up_bias)
    transform   gh = gz @ T_bᵀ, and its sum (down_bias); on Hopper in the same kernel
    outer       G_b = hᵀ @ gz, the gradient of T_b, in the compute dtype
    unmix       one pass over G: dtransforms = aᵀ @ G and da = <G_b, transforms>
    unattend    softmax, cosine and mean backward: one program per sample
    reduce      the sums over samples and tiles: centers and biases
    transform   dx = gh @ down + dq / N

The two weight gradients are plain products and go to cuBLAS. Rows are tiled over all B·N tokens:
tiles per sample would pad 196 tokens to 256. A tile that straddles samples is loaded once per
sample through a [B, N, R] descriptor, whose out-of-range rows read as zero, and the products add.

On Hopper and newer a kernel is launched while the one before runs (programmatic dependent launch)
and waits for its end; what it reads before are parameters and, in the backward, the forward's
state. By then they have been written: `project`, with which a pass begins, waits before it lets the
next be launched, and where PyTorch's products stand in front, those wait for all before them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.reductions import kahan_add

NORM_EPS = tl.constexpr(1e-12)  # F.normalize's


@triton.jit
def _sample_of_row(row, first, tokens, BM: tl.constexpr, BS: tl.constexpr):
    """One-hot rows [BM, BS]: which of the samples from ``first`` on a row belongs to."""
    o_m = row + tl.arange(0, BM)
    return (o_m // tokens - first)[:, None] == tl.arange(0, BS)[None, :]


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
    hot0 = _sample_of_row(row, first, tokens, BM0, BS).to(dtype)
    acc0 = tl.zeros((BM0, BN), tl.float32)
    if BM1 > 0:
        hot1 = _sample_of_row(row + BM0, first, tokens, BM1, BS).to(dtype)
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
def _state(ptr, batch, width, num_centers):
    """Where a [B, K], s [B, K], q [B, C], |q| [B] and |centers| [K] lie in the packed state."""
    batch = tl.cast(batch, tl.int64)
    s_ptr = ptr + batch * num_centers
    q_ptr = s_ptr + batch * num_centers
    q_norm_ptr = q_ptr + batch * width
    return s_ptr, q_ptr, q_norm_ptr, q_norm_ptr + batch


@triton.jit
def _load_centers(ptr, c, width, num_centers: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr):
    # num_centers is a constant here, so that the compiler knows how far rows are aligned.
    o_c = c + tl.arange(0, BC)
    o_k = tl.arange(0, BK)
    p = ptr + o_c[:, None] * num_centers + o_k[None, :]
    mask = (o_c < width)[:, None] & (o_k < num_centers)[None, :]
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def attend_kernel(
    sums_ptr,  # [tiles, slots, C]
    centers_ptr,  # [C, K]
    state_ptr,  # fp32: softmax a [B, K], cosines s [B, K], mean tokens q [B, C], |q|, |centers|
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
    if PDL:
        gdc_launch_dependents()
    sample = tl.program_id(0)
    s_ptr, q_ptr, q_norm_ptr, c_norm_ptr = _state(state_ptr, batch, width, num_centers)
    o_k = tl.arange(0, BK)
    m_k = o_k < num_centers
    c_square = tl.zeros((BK,), tl.float32)
    if ONE_BLOCK:
        # A parameter: nothing that still runs writes it, so the load need not wait.
        centers = _load_centers(centers_ptr, 0, width, num_centers, BC, BK)
        c_square += tl.sum(centers * centers, 0)
    if PDL:
        gdc_wait()
    first = sample * tokens // tile_rows
    tiles = (sample * tokens + tokens - 1) // tile_rows - first + 1
    dots = tl.zeros((BK,), tl.float32)
    q_square = tl.zeros((BC,), tl.float32)
    for c in range(0, width, BC):
        if not ONE_BLOCK:
            centers = _load_centers(centers_ptr, c, width, num_centers, BC, BK)
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
    """a @ b with an fp32 ``a`` in two parts of b's dtype, the high bits and what they leave."""
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
    """Rows [row, row + BM) of h, each times its sample's T_b (or T_bᵀ): [BM, BR] fp32."""
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
            hot0 = _sample_of_row(row0, first, tokens, BM0, BS).to(dtype)
            if BM1 > 0:
                hot1 = _sample_of_row(row1, first, tokens, BM1, BS).to(dtype)
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


@triton.jit
def outer_kernel(
    h_desc,  # [B, N, R], blocks of [1, BK, BI]
    g_desc,  # [B, N, R], blocks of [1, BK, BJ]
    out_desc,  # [B, R, R], blocks of [1, BI, BJ]
    tokens,
    tiles_j,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = (tl.program_id(0) // tiles_j) * BI
    j = (tl.program_id(0) % tiles_j) * BJ
    sample = tl.program_id(1)
    acc = tl.zeros((BI, BJ), tl.float32)
    for n in range(0, tokens, BK):
        h = h_desc.load([sample, n, i]).reshape(BK, BI)
        g = g_desc.load([sample, n, j]).reshape(BK, BJ)
        acc = tl.dot(h.T, g, acc)
    out_desc.store([sample, i, j], acc.to(out_desc.dtype).reshape(1, BI, BJ))


@triton.jit
def unmix_kernel(
    g_ptr,  # [B, size]: gradients of the mixed transforms
    g_desc,  # the same, blocks of [BB, BS], or None if its rows are not aligned
    a_ptr,  # [B, K] fp32
    transforms_ptr,  # [K, size]
    d_transforms_ptr,  # [K, size]
    da_ptr,  # [programs, B, K] fp32 partial sums
    batch,
    num_centers,
    size,
    BB: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
    NEED_T: tl.constexpr,
    NEED_A: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    o_k = tl.arange(0, BK)
    m_k = o_k < num_centers
    dtype = g_ptr.dtype.element_ty
    for block in range(program, tl.cdiv(size, BS), programs):
        o_s = block * BS + tl.arange(0, BS)
        m_ks = m_k[:, None] & (o_s[None, :] < size)
        o_t = o_k[:, None].to(tl.int64) * size + o_s[None, :]
        if NEED_A:
            # A parameter: nothing that still runs writes it, so the load need not wait.
            t = tl.load(transforms_ptr + o_t, mask=m_ks, other=0.0).to(dtype)
        if PDL:
            gdc_wait()
        acc = tl.zeros((BS, BK), tl.float32)
        lost = tl.zeros((BS, BK), tl.float32)
        for b in range(0, batch, BB):
            o_b = b + tl.arange(0, BB)
            if g_desc is None:
                p_g = g_ptr + o_b[:, None].to(tl.int64) * size + o_s[None, :]
                m_g = (o_b[:, None] < batch) & (o_s[None, :] < size)
                g = tl.load(p_g, mask=m_g, other=0.0)
            else:
                g = g_desc.load([b, block * BS])
            o_a = o_b[:, None].to(tl.int64) * num_centers + o_k[None, :]
            m_a = (o_b[:, None] < batch) & m_k[None, :]
            if NEED_T:
                a = tl.load(a_ptr + o_a, mask=m_a, other=0.0)
                if dtype == tl.float32:
                    acc, lost = kahan_add(acc, lost, tl.dot(g.T, a, input_precision="ieee"))
                else:
                    high = a.to(dtype)
                    low = (a - high.to(tl.float32)).to(dtype)
                    acc = tl.dot(g.T, low, tl.dot(g.T, high, acc))
            if NEED_A:
                da = tl.dot(g, t.T, input_precision="ieee")
                p_da = da_ptr + program.to(tl.int64) * batch * num_centers + o_a
                if block != program:
                    tl.debug_barrier()  # this program wrote these sums on its last turn
                    da += tl.load(p_da, mask=m_a, other=0.0)
                    tl.debug_barrier()
                tl.store(p_da, da, mask=m_a)
        if NEED_T:
            d_t = acc.T.to(d_transforms_ptr.dtype.element_ty)
            tl.store(d_transforms_ptr + o_t, d_t, mask=m_ks)


@triton.jit
def unattend_kernel(
    da_ptr,  # [programs, B, K]
    state_ptr,  # as in `attend`
    centers_ptr,  # [C, K]
    ds_ptr,  # [B, K] gradient of the cosine similarities
    dq_ptr,  # [B, C] gradient of the mean token, divided by N
    programs,
    batch,
    tokens,
    width,
    num_centers: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    NEED_X: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # BC >= C
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    s_ptr, q_ptr, q_norm_ptr, c_norm_ptr = _state(state_ptr, batch, width, num_centers)
    sample = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BK)
    m_k = o_k < num_centers
    o_a = sample * num_centers + o_k
    # The forward's state and a parameter: only da has to be waited for.
    a = tl.load(state_ptr + o_a, mask=m_k, other=0.0)
    if NEED_X:
        s = tl.load(s_ptr + o_a, mask=m_k, other=0.0)
        c_norm = tl.maximum(tl.load(c_norm_ptr + o_k, mask=m_k, other=1.0), NORM_EPS)
        q_norm = tl.load(q_norm_ptr + sample)
        if ONE_BLOCK:
            centers = _load_centers(centers_ptr, 0, width, num_centers, BC, BK)
            o_c = tl.arange(0, BC)
            q = tl.load(q_ptr + sample * width + o_c, mask=o_c < width, other=0.0)
    if PDL:
        gdc_wait()
    da = tl.zeros((BP, BK), tl.float32)
    for p in range(0, programs, BP):
        o_p = p + tl.arange(0, BP)
        p_da = da_ptr + o_p[:, None].to(tl.int64) * batch * num_centers + o_a[None, :]
        da += tl.load(p_da, mask=(o_p < programs)[:, None] & m_k[None, :], other=0.0)
    da = tl.sum(da, 0)
    ds = a * (da - tl.sum(a * da, 0))
    tl.store(ds_ptr + o_a, ds, mask=m_k)
    if NEED_X:
        # Below eps F.normalize divides by a constant: no derivative through the norm there.
        along = tl.where(q_norm >= NORM_EPS, tl.sum(ds * s, 0), 0.0)
        q_norm = tl.maximum(q_norm, NORM_EPS)
        ds_c = tl.div_rn(ds, c_norm)
        for c in range(0, width, BC):
            o_c = c + tl.arange(0, BC)
            m_c = o_c < width
            if not ONE_BLOCK:
                centers = _load_centers(centers_ptr, c, width, num_centers, BC, BK)
                q = tl.load(q_ptr + sample * width + o_c, mask=m_c, other=0.0)
            dq = (tl.sum(centers * ds_c[None, :], 1) - q / q_norm * along) / q_norm
            dq = (dq / tokens).to(dq_ptr.dtype.element_ty)
            tl.store(dq_ptr + sample * width + o_c, dq, mask=m_c)


@triton.jit
def reduce_kernel(
    ds_ptr,  # [B, K]
    state_ptr,  # as in `attend`
    centers_ptr,  # [C, K]
    d_centers_ptr,  # [C, K]
    up_sums_ptr,  # [tiles, C]
    d_up_bias_ptr,  # [C]
    down_sums_ptr,  # [tiles, R]
    d_down_bias_ptr,  # [R]
    batch,
    width,
    rank,
    up_tiles,
    down_tiles,
    center_programs,
    up_programs,
    num_centers: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    NEED_CENTERS: tl.constexpr,
    NEED_UP: tl.constexpr,
    NEED_DOWN: tl.constexpr,
    PDL: tl.constexpr,
):
    """The sums over samples and tiles, by 32 columns: centers, then up_bias, then down_bias."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    o_c = program * BC + tl.arange(0, BC)
    if program < center_programs:
        if NEED_CENTERS:
            m_c = o_c < width
            s_ptr, q_ptr, q_norm_ptr, c_norm_ptr = _state(state_ptr, batch, width, num_centers)
            o_k = tl.arange(0, BK)
            m_k = o_k < num_centers
            acc = tl.zeros((BC, BK), tl.float32)
            lost = tl.zeros((BC, BK), tl.float32)
            along = tl.zeros((BB, BK), tl.float32)
            along_lost = tl.zeros((BB, BK), tl.float32)
            for b in range(0, batch, BB):
                o_b = b + tl.arange(0, BB)
                m_b = o_b < batch
                p_q = q_ptr + o_b[:, None].to(tl.int64) * width + o_c[None, :]
                q = tl.load(p_q, mask=m_b[:, None] & m_c[None, :], other=0.0)
                q_norm = tl.load(q_norm_ptr + o_b, mask=m_b, other=1.0)
                o_a = o_b[:, None].to(tl.int64) * num_centers + o_k[None, :]
                m_a = m_b[:, None] & m_k[None, :]
                ds = tl.load(ds_ptr + o_a, mask=m_a, other=0.0)
                s = tl.load(s_ptr + o_a, mask=m_a, other=0.0)
                along, along_lost = kahan_add(along, along_lost, ds * s)
                q = q / tl.maximum(q_norm, NORM_EPS)[:, None]
                acc, lost = kahan_add(acc, lost, tl.dot(q.T, ds, input_precision="ieee"))
            c_norm = tl.load(c_norm_ptr + o_k, mask=m_k, other=1.0)
            along = tl.where(c_norm >= NORM_EPS, tl.sum(along, 0), 0.0)
            c_norm = tl.maximum(c_norm, NORM_EPS)[None, :]
            o_ck = o_c[:, None] * num_centers + o_k[None, :]
            m_ck = m_c[:, None] & m_k[None, :]
            centers = _load_centers(centers_ptr, program * BC, width, num_centers, BC, BK)
            d_centers = (acc - centers / c_norm * along[None, :]) / c_norm
            tl.store(d_centers_ptr + o_ck, d_centers.to(d_centers_ptr.dtype.element_ty), mask=m_ck)
    elif program < center_programs + up_programs:
        if NEED_UP:
            o_c -= center_programs * BC
            _sum_rows(up_sums_ptr, d_up_bias_ptr, up_tiles, width, o_c, o_c < width, BC)
    else:
        if NEED_DOWN:
            o_c -= (center_programs + up_programs) * BC
            _sum_rows(down_sums_ptr, d_down_bias_ptr, down_tiles, rank, o_c, o_c < rank, BC)


@triton.jit
def _sum_rows(in_ptr, out_ptr, rows, width, o_c, m_c, BC: tl.constexpr):
    BB: tl.constexpr = 512
    acc = tl.zeros((BB, BC), tl.float32)
    for r in range(0, rows, BB):
        o_r = r + tl.arange(0, BB)
        p = in_ptr + o_r[:, None].to(tl.int64) * width + o_c[None, :]
        acc += tl.load(p, mask=(o_r < rows)[:, None] & m_c[None, :], other=0.0)
    tl.store(out_ptr + o_c, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=m_c)
