"""Triton kernels that only the backward of cluster attention needs.

With g = dL/dy [B·N, C] and what the forward saved: h, T_b, z and the packed state (a, s, q, norms):

(1)  project          gz  = g @ up                              [B·N, R]
                      dup_bias = sum of g over rows             [C]
(2)  transform        gh  = gz @ T_bᵀ                           [B·N, R]
                      ddown_bias = sum of gh over rows          [R]
(3)  outer            G_b = h_bᵀ @ gz_b                         [B, R, R]
(4)  unmix            dtransforms[k] = sum_b a[b, k] · G_b      [K, R, R]
                      da[b, k] = <G_b, transforms[k]>           [B, K]    fp32
(5)  unattend         ds  = a · (da − sum_k a · da)             [B, K]    fp32
                      dq  = gradient of the mean token          [B, C]
(6)  parameter_sums   dcenters, and the sums of (1) and (2) over tiles
(7)  transform        dx  = gh @ down + dq / N                  [B·N, C]

(1), (2) and (7) are kernels of :mod:`fastadapt.kernels.cluster_attention.triton_forward` in other
variants, or those of :mod:`fastadapt.kernels.cluster_attention.hopper_backward`. The two weight
gradients, dup = gᵀ @ z and ddown = ghᵀ @ x, are plain products and cuBLAS's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.reductions import kahan_add
from .triton_helpers import NORM_EPS, load_centers, state_pointers


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
    """Compute (3) for a block of one sample's G_b."""
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
    """Compute (4) in one pass over G."""
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
    state_ptr,  # as `attend` packs it
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
    """Compute (5): one program for each sample."""
    if PDL:
        gdc_launch_dependents()
    s_ptr, q_ptr, q_norm_ptr, c_norm_ptr = state_pointers(state_ptr, batch, width, num_centers)
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
            centers = load_centers(centers_ptr, 0, width, num_centers, BC, BK)
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
                centers = load_centers(centers_ptr, c, width, num_centers, BC, BK)
                q = tl.load(q_ptr + sample * width + o_c, mask=m_c, other=0.0)
            dq = (tl.sum(centers * ds_c[None, :], 1) - q / q_norm * along) / q_norm
            dq = (dq / tokens).to(dq_ptr.dtype.element_ty)
            tl.store(dq_ptr + sample * width + o_c, dq, mask=m_c)


@triton.jit
def parameter_sums_kernel(
    ds_ptr,  # [B, K]
    state_ptr,  # as `attend` packs it
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
    """Compute (6), by 32 columns: of the centers, then of up_bias, then of down_bias."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    o_c = program * BC + tl.arange(0, BC)
    if program < center_programs:
        if NEED_CENTERS:
            m_c = o_c < width
            s_ptr, q_ptr, q_norm_ptr, c_norm_ptr = state_pointers(
                state_ptr, batch, width, num_centers
            )
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
            centers = load_centers(centers_ptr, program * BC, width, num_centers, BC, BK)
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
