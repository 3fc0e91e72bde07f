"""Triton kernel of a quaternion layer's output and of the gradient of x.

Imported on first use only. Equations (1) and (2) of :mod:`.triton_algebra`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .triton_algebra import hamilton, operand, rotate


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x_ptr,  # [G, M, 4·K]: x, or BACKWARD the gradient of y
    r_ptr,  # [G, K, N] each, or BACKWARD [G, N, K]
    i_ptr,
    j_ptr,
    k_ptr,
    scale_ptr,  # the same, or None
    bias_ptr,  # [G, 4·N] or None
    out_ptr,  # [G, M, 4·N]: y, or BACKWARD dx; [splits, G, M, 4·N] fp32 if there are several
    rows,
    depth,  # K
    width,  # N
    x_g,
    x_m,
    x_k,
    depth_per_split,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BACKWARD: tl.constexpr,
    ROTATION: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    IN_HALF: tl.constexpr,  # the input is the components j and k alone
    OUT_HALF: tl.constexpr,  # only those of the output are wanted
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute all four components of a tile: each weight is read once for its four uses."""
    tiles_n = tl.cdiv(width, BN)
    o_m = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    o_n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    split = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    m_m = (o_m < rows)[:, None]
    m_n = (o_n < width)[None, :]
    k_start = split * depth_per_split
    o_k = k_start + tl.arange(0, BK)
    k_end = tl.minimum(k_start + depth_per_split, depth)

    # A weight tile is [BK, BN] in both directions.
    w_k = 1 if BACKWARD else width
    w_n = depth if BACKWARD else 1
    o_w = group * depth * width + o_k[:, None].to(tl.int64) * w_k + o_n[None, :].to(tl.int64) * w_n
    step_w = tl.cast(w_k, tl.int64) * BK
    step_x = tl.cast(x_k, tl.int64) * BK
    component = tl.cast(x_k, tl.int64) * depth
    p_x = x_ptr + group * x_g + o_m[:, None].to(tl.int64) * x_m + o_k[None, :].to(tl.int64) * x_k
    acc0 = tl.zeros((BM, BN), tl.float32)
    acc1 = tl.zeros((BM, BN), tl.float32)
    acc2 = tl.zeros((BM, BN), tl.float32)
    acc3 = tl.zeros((BM, BN), tl.float32)
    zeros = tl.zeros((BM, BN), tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for k in range(k_start, k_end, BK):
        left = k_end - k
        m_x = m_m & (tl.arange(0, BK) < left)[None, :]
        m_w = (tl.arange(0, BK) < left)[:, None] & m_n
        if IN_HALF:
            x2 = operand(tl.load(p_x, mask=m_x, other=0.0), dtype, PRECISION)
            x3 = operand(tl.load(p_x + component, mask=m_x, other=0.0), dtype, PRECISION)
            x0 = x2  # not used
            x1 = x2
        else:
            if ROTATION:
                x0 = tl.zeros((BM, BK), dtype)  # not used
            else:
                x0 = operand(tl.load(p_x, mask=m_x, other=0.0), dtype, PRECISION)
            x1 = operand(tl.load(p_x + component, mask=m_x, other=0.0), dtype, PRECISION)
            x2 = operand(tl.load(p_x + 2 * component, mask=m_x, other=0.0), dtype, PRECISION)
            x3 = operand(tl.load(p_x + 3 * component, mask=m_x, other=0.0), dtype, PRECISION)
        w0 = tl.load(r_ptr + o_w, mask=m_w, other=0.0)
        w1 = tl.load(i_ptr + o_w, mask=m_w, other=0.0)
        w2 = tl.load(j_ptr + o_w, mask=m_w, other=0.0)
        w3 = tl.load(k_ptr + o_w, mask=m_w, other=0.0)
        # In full fp32, each tile is summed on its own and then added: shorter sums round less.
        acc = (acc0, acc1, acc2, acc3)
        if PRECISION == "ieee":
            acc = (zeros, zeros, zeros, zeros)
        if ROTATION:
            w = (w0.to(tl.float32), w1.to(tl.float32), w2.to(tl.float32), w3.to(tl.float32))
            scale = w0
            if SCALE:
                scale = tl.load(scale_ptr + o_w, mask=m_w, other=0.0).to(tl.float32)
            acc = rotate(
                (x0, x1, x2, x3),
                w,
                scale,
                acc,
                dtype,
                BACKWARD,
                SCALE,
                IN_HALF,
                OUT_HALF,
                PRECISION,
            )
        else:
            w = (
                operand(w0, dtype, PRECISION),
                operand(w1, dtype, PRECISION),
                operand(w2, dtype, PRECISION),
                operand(w3, dtype, PRECISION),
            )
            acc = hamilton((x0, x1, x2, x3), w, acc, False, BACKWARD, IN_HALF, OUT_HALF, PRECISION)
        if PRECISION == "ieee":
            acc0 += acc[0]
            acc1 += acc[1]
            acc2 += acc[2]
            acc3 += acc[3]
        else:
            acc0, acc1, acc2, acc3 = acc
        p_x += step_x
        o_w += step_w

    components: tl.constexpr = 2 if OUT_HALF else 4
    m_out = m_m & m_n
    row = (split * tl.num_programs(2) + group) * rows + o_m[:, None].to(tl.int64)
    p_out = out_ptr + row * components * width + o_n[None, :]
    if BIAS:
        p_bias = bias_ptr + group * 4 * width + o_n
        m_b = o_n < tl.where(split == 0, width, 0)
        acc0 += tl.load(p_bias, mask=m_b, other=0.0).to(tl.float32)[None, :]
        acc1 += tl.load(p_bias + width, mask=m_b, other=0.0).to(tl.float32)[None, :]
        acc2 += tl.load(p_bias + 2 * width, mask=m_b, other=0.0).to(tl.float32)[None, :]
        acc3 += tl.load(p_bias + 3 * width, mask=m_b, other=0.0).to(tl.float32)[None, :]
    if not OUT_HALF:
        tl.store(p_out, acc0.to(out_ptr.dtype.element_ty), mask=m_out)
        tl.store(p_out + width, acc1.to(out_ptr.dtype.element_ty), mask=m_out)
        p_out += 2 * width
    tl.store(p_out, acc2.to(out_ptr.dtype.element_ty), mask=m_out)
    tl.store(p_out + width, acc3.to(out_ptr.dtype.element_ty), mask=m_out)
