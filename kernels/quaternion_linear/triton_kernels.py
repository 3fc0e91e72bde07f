"""Triton kernels of quaternion linear layers; imported on first use only.

All three products of a layer are products of quaternions whose components are matrices, w ⊗ x:

    output            y  = W ⊗ x, reduced over the inputs
    gradient of x     dx = W̄ ⊗ g, reduced over the outputs
    gradient of W     dW = g ⊗ x̄, reduced over the rows

so that one function, `_hamilton`, does all of them: 16 tile products for 4 output tiles. Rotations
have 9 products in its place, with entries that are computed from the weights where they are used;
turning back (dx) is turning by the conjugate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.reductions import kahan_add, sum_parts

ROTATION_EPS = tl.constexpr(1e-4)  # as in quaternion_linear.py


@triton.jit
def _hamilton(
    x,
    w,
    acc,
    CONJ_X: tl.constexpr,
    CONJ_W: tl.constexpr,
    IN_HALF: tl.constexpr,
    OUT_HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + w ⊗ x, component by component, each a matrix product x_a @ w_b.

    Args:
        x, w, acc: the components r, i, j, k.
        CONJ_X, CONJ_W: conjugate x or w.
        IN_HALF: x has only the components j and k.
        OUT_HALF: only those of the result are needed.
    """
    x0, x1, x2, x3 = x
    w0, w1, w2, w3 = w
    acc0, acc1, acc2, acc3 = acc
    if not IN_HALF:
        vector0 = -x0 if CONJ_W else x0
        scalar1 = -x1 if CONJ_X else x1
        plus1 = x1 if CONJ_X == CONJ_W else -x1
        minus1 = -x1 if CONJ_X == CONJ_W else x1
        if not OUT_HALF:
            acc0 = tl.dot(x0, w0, acc0, input_precision=PRECISION)
            acc0 = tl.dot(minus1, w1, acc0, input_precision=PRECISION)
            acc1 = tl.dot(vector0, w1, acc1, input_precision=PRECISION)
            acc1 = tl.dot(scalar1, w0, acc1, input_precision=PRECISION)
        acc2 = tl.dot(vector0, w2, acc2, input_precision=PRECISION)
        acc2 = tl.dot(plus1, w3, acc2, input_precision=PRECISION)
        acc3 = tl.dot(vector0, w3, acc3, input_precision=PRECISION)
        acc3 = tl.dot(minus1, w2, acc3, input_precision=PRECISION)
    scalar2 = -x2 if CONJ_X else x2
    scalar3 = -x3 if CONJ_X else x3
    plus2 = x2 if CONJ_X == CONJ_W else -x2
    plus3 = x3 if CONJ_X == CONJ_W else -x3
    minus2 = -x2 if CONJ_X == CONJ_W else x2
    minus3 = -x3 if CONJ_X == CONJ_W else x3
    if not OUT_HALF:
        acc0 = tl.dot(minus2, w2, acc0, input_precision=PRECISION)
        acc0 = tl.dot(minus3, w3, acc0, input_precision=PRECISION)
        acc1 = tl.dot(minus2, w3, acc1, input_precision=PRECISION)
        acc1 = tl.dot(plus3, w2, acc1, input_precision=PRECISION)
    # Hopper's tensor cores read a negated operand from registers. Triton 3.6 lets the last product
    # run on behind the loop, where those registers get other values: let it be one of x itself.
    if CONJ_X:
        acc3 = tl.dot(plus2, w1, acc3, input_precision=PRECISION)
        acc3 = tl.dot(scalar3, w0, acc3, input_precision=PRECISION)
        acc2 = tl.dot(scalar2, w0, acc2, input_precision=PRECISION)
        acc2 = tl.dot(minus3, w1, acc2, input_precision=PRECISION)
    else:
        acc2 = tl.dot(scalar2, w0, acc2, input_precision=PRECISION)
        acc2 = tl.dot(minus3, w1, acc2, input_precision=PRECISION)
        acc3 = tl.dot(plus2, w1, acc3, input_precision=PRECISION)
        acc3 = tl.dot(scalar3, w0, acc3, input_precision=PRECISION)
    return acc0, acc1, acc2, acc3


@triton.jit
def _operand(t, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """t as the products take it. TF32 is rounded to nearest: the tensor cores would truncate."""
    t = t.to(dtype)
    if dtype == tl.float32 and PRECISION == "tf32":
        rounded = ((t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        t = tl.where(t == t, rounded, t)
    return t


@triton.jit
def _unit(r, i, j, k):
    """The normalised weights, and one over the norm."""
    inverse = tl.div_rn(1.0, tl.sqrt_rn(r * r + i * i + j * j + k * k + ROTATION_EPS))
    return r * inverse, i * inverse, j * inverse, k * inverse, inverse


@triton.jit
def _rotation_entries(r, i, j, k):
    """The 3 × 3 matrix of the rotation by a unit quaternion, row (input) by row."""
    return (
        1 - 2 * (j * j + k * k),
        2 * (i * j + r * k),
        2 * (i * k - r * j),
        2 * (i * j - r * k),
        1 - 2 * (i * i + k * k),
        2 * (j * k + r * i),
        2 * (i * k + r * j),
        2 * (j * k - r * i),
        1 - 2 * (i * i + j * j),
    )


@triton.jit
def _rotate(
    x,
    w,
    scale,
    acc,
    dtype: tl.constexpr,
    BACK: tl.constexpr,
    SCALE: tl.constexpr,
    IN_HALF: tl.constexpr,
    OUT_HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + x turned by w, or turned back; the component r of the result is left alone."""
    _, x1, x2, x3 = x
    r, i, j, k, _ = _unit(w[0], w[1], w[2], w[3])
    if BACK:
        r = -r
    e11, e12, e13, e21, e22, e23, e31, e32, e33 = _rotation_entries(r, i, j, k)
    if SCALE:
        e11, e12, e13 = e11 * scale, e12 * scale, e13 * scale
        e21, e22, e23 = e21 * scale, e22 * scale, e23 * scale
        e31, e32, e33 = e31 * scale, e32 * scale, e33 * scale
    acc0, acc1, acc2, acc3 = acc
    if not OUT_HALF:
        if not IN_HALF:
            acc1 = tl.dot(x1, _operand(e11, dtype, PRECISION), acc1, input_precision=PRECISION)
        acc1 = tl.dot(x2, _operand(e21, dtype, PRECISION), acc1, input_precision=PRECISION)
        acc1 = tl.dot(x3, _operand(e31, dtype, PRECISION), acc1, input_precision=PRECISION)
    if not IN_HALF:
        acc2 = tl.dot(x1, _operand(e12, dtype, PRECISION), acc2, input_precision=PRECISION)
        acc3 = tl.dot(x1, _operand(e13, dtype, PRECISION), acc3, input_precision=PRECISION)
    acc2 = tl.dot(x2, _operand(e22, dtype, PRECISION), acc2, input_precision=PRECISION)
    acc2 = tl.dot(x3, _operand(e32, dtype, PRECISION), acc2, input_precision=PRECISION)
    acc3 = tl.dot(x2, _operand(e23, dtype, PRECISION), acc3, input_precision=PRECISION)
    acc3 = tl.dot(x3, _operand(e33, dtype, PRECISION), acc3, input_precision=PRECISION)
    return acc0, acc1, acc2, acc3


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
    """All four components of an output tile: each weight is read once for its four uses."""
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
            x2 = _operand(tl.load(p_x, mask=m_x, other=0.0), dtype, PRECISION)
            x3 = _operand(tl.load(p_x + component, mask=m_x, other=0.0), dtype, PRECISION)
            x0 = x2  # not used
            x1 = x2
        else:
            if ROTATION:
                x0 = tl.zeros((BM, BK), dtype)  # not used
            else:
                x0 = _operand(tl.load(p_x, mask=m_x, other=0.0), dtype, PRECISION)
            x1 = _operand(tl.load(p_x + component, mask=m_x, other=0.0), dtype, PRECISION)
            x2 = _operand(tl.load(p_x + 2 * component, mask=m_x, other=0.0), dtype, PRECISION)
            x3 = _operand(tl.load(p_x + 3 * component, mask=m_x, other=0.0), dtype, PRECISION)
        w0 = tl.load(r_ptr + o_w, mask=m_w, other=0.0)
        w1 = tl.load(i_ptr + o_w, mask=m_w, other=0.0)
        w2 = tl.load(j_ptr + o_w, mask=m_w, other=0.0)
        w3 = tl.load(k_ptr + o_w, mask=m_w, other=0.0)
        # In full fp32, sums of a tile are added to the sum so far: shorter sums round less.
        acc = (acc0, acc1, acc2, acc3)
        if PRECISION == "ieee":
            acc = (zeros, zeros, zeros, zeros)
        if ROTATION:
            w = (w0.to(tl.float32), w1.to(tl.float32), w2.to(tl.float32), w3.to(tl.float32))
            scale = w0
            if SCALE:
                scale = tl.load(scale_ptr + o_w, mask=m_w, other=0.0).to(tl.float32)
            acc = _rotate(
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
                _operand(w0, dtype, PRECISION),
                _operand(w1, dtype, PRECISION),
                _operand(w2, dtype, PRECISION),
                _operand(w3, dtype, PRECISION),
            )
            acc = _hamilton((x0, x1, x2, x3), w, acc, False, BACKWARD, IN_HALF, OUT_HALF, PRECISION)
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


@triton.jit
def _unrotate(d, r, i, j, k, inverse):
    """From gradients of the 9 entries to those of the weights (before they were normalised)."""
    d11, d12, d13, d21, d22, d23, d31, d32, d33 = d
    dr = 2 * (k * (d12 - d21) + j * (d31 - d13) + i * (d23 - d32))
    di = 2 * (j * (d21 + d12) + k * (d31 + d13) + r * (d23 - d32) - 2 * i * (d22 + d33))
    dj = 2 * (i * (d21 + d12) + k * (d32 + d23) + r * (d31 - d13) - 2 * j * (d11 + d33))
    dk = 2 * (i * (d31 + d13) + j * (d32 + d23) + r * (d12 - d21) - 2 * k * (d11 + d22))
    along = r * dr + i * di + j * dj + k * dk
    return (
        (dr - r * along) * inverse,
        (di - i * along) * inverse,
        (dj - j * along) * inverse,
        (dk - k * along) * inverse,
    )


@triton.jit(do_not_specialize=["rows"])
def gradient_kernel(
    x_ptr,  # [G, M, 4·I]
    g_ptr,  # [G, M, 4·O]
    r_ptr,  # [G, I, O] each; read for rotations only
    i_ptr,
    j_ptr,
    k_ptr,
    scale_ptr,
    dw_ptr,  # [4, G, I, O] (5 with a scale); [splits, …] fp32 if there are several
    db_ptr,  # [G, 4·O], or [splits, G, 4·O]
    rows,
    inputs,  # I
    outputs,  # O
    x_g,
    x_m,
    x_i,
    g_g,
    g_m,
    g_o,
    rows_per_split,
    BM: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
    ROTATION: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,  # x is the components j and k alone
    WEIGHTS: tl.constexpr,  # their gradients are wanted
    BIAS: tl.constexpr,  # its gradient is wanted
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gradients of all weights for a tile [BI, BO] of them, and the bias's."""
    tiles_o = tl.cdiv(outputs, BO)
    tile_i = tl.program_id(0) // tiles_o
    o_i = tile_i * BI + tl.arange(0, BI)
    o_o = (tl.program_id(0) % tiles_o) * BO + tl.arange(0, BO)
    split = tl.program_id(1)
    groups = tl.num_programs(2)
    group = tl.program_id(2).to(tl.int64)
    m_i = o_i < inputs
    m_o = o_o < outputs
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, rows)
    o_m = start + tl.arange(0, BM)
    # x is loaded transposed.
    p_x = x_ptr + group * x_g + o_i[:, None].to(tl.int64) * x_i + o_m[None, :].to(tl.int64) * x_m
    p_g = g_ptr + group * g_g + o_m[:, None].to(tl.int64) * g_m + o_o[None, :].to(tl.int64) * g_o
    x_c = tl.cast(x_i, tl.int64) * inputs
    g_c = tl.cast(g_o, tl.int64) * outputs

    zeros = tl.zeros((BI, BO), tl.float32)
    d = (zeros, zeros, zeros, zeros)
    lost = d
    e = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    e_lost = e
    b0 = tl.zeros((BO,), tl.float32)
    b1, b2, b3, b0_lost, b1_lost, b2_lost, b3_lost = b0, b0, b0, b0, b0, b0, b0
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for m in range(start, end, BM):
        m_m = tl.arange(0, BM) < end - m
        m_x = m_i[:, None] & m_m[None, :]
        m_g = m_m[:, None] & m_o[None, :]
        # Of a rotation's component r only the bias gets a gradient.
        if ROTATION and not BIAS:
            g0 = tl.zeros((BM, BO), g_ptr.dtype.element_ty)
        else:
            g0 = tl.load(p_g, mask=m_g, other=0.0)
        g1 = tl.load(p_g + g_c, mask=m_g, other=0.0)
        g2 = tl.load(p_g + 2 * g_c, mask=m_g, other=0.0)
        g3 = tl.load(p_g + 3 * g_c, mask=m_g, other=0.0)
        # One is known at compile time, the other is not.
        if BIAS:  # noqa: SIM102
            if tile_i == 0:
                b0, b0_lost = kahan_add(b0, b0_lost, tl.sum(g0.to(tl.float32), 0))
                b1, b1_lost = kahan_add(b1, b1_lost, tl.sum(g1.to(tl.float32), 0))
                b2, b2_lost = kahan_add(b2, b2_lost, tl.sum(g2.to(tl.float32), 0))
                b3, b3_lost = kahan_add(b3, b3_lost, tl.sum(g3.to(tl.float32), 0))
        if WEIGHTS:
            g0 = _operand(g0, dtype, PRECISION)
            g1 = _operand(g1, dtype, PRECISION)
            g2 = _operand(g2, dtype, PRECISION)
            g3 = _operand(g3, dtype, PRECISION)
            if HALF:
                x2 = _operand(tl.load(p_x, mask=m_x, other=0.0), dtype, PRECISION)
                x3 = _operand(tl.load(p_x + x_c, mask=m_x, other=0.0), dtype, PRECISION)
                x0 = x2  # not used
                x1 = x2
            else:
                x1 = _operand(tl.load(p_x + x_c, mask=m_x, other=0.0), dtype, PRECISION)
                x2 = _operand(tl.load(p_x + 2 * x_c, mask=m_x, other=0.0), dtype, PRECISION)
                x3 = _operand(tl.load(p_x + 3 * x_c, mask=m_x, other=0.0), dtype, PRECISION)
                x0 = x1  # not used
                if not ROTATION:
                    x0 = _operand(tl.load(p_x, mask=m_x, other=0.0), dtype, PRECISION)
            if ROTATION:
                e, e_lost = _outer(e, e_lost, (x1, x2, x3), (g1, g2, g3), HALF, PRECISION)
            elif PRECISION == "ieee":
                tile = _hamilton(
                    (x0, x1, x2, x3),
                    (g0, g1, g2, g3),
                    (zeros, zeros, zeros, zeros),
                    True,
                    False,
                    HALF,
                    False,
                    PRECISION,
                )
                d0, lost0 = kahan_add(d[0], lost[0], tile[0])
                d1, lost1 = kahan_add(d[1], lost[1], tile[1])
                d2, lost2 = kahan_add(d[2], lost[2], tile[2])
                d3, lost3 = kahan_add(d[3], lost[3], tile[3])
                d = (d0, d1, d2, d3)
                lost = (lost0, lost1, lost2, lost3)
            else:
                d = _hamilton(
                    (x0, x1, x2, x3), (g0, g1, g2, g3), d, True, False, HALF, False, PRECISION
                )
        p_x += tl.cast(x_m, tl.int64) * BM
        p_g += tl.cast(g_m, tl.int64) * BM

    size = tl.cast(inputs, tl.int64) * outputs
    o_w = o_i[:, None].to(tl.int64) * outputs + o_o[None, :]
    m_w = m_i[:, None] & m_o[None, :]
    if WEIGHTS:
        kinds: tl.constexpr = 5 if SCALE else 4
        p_d = dw_ptr + (split.to(tl.int64) * kinds * groups + group) * size + o_w
        if ROTATION:
            o_w += group * size
            r = tl.load(r_ptr + o_w, mask=m_w, other=0.0).to(tl.float32)
            i = tl.load(i_ptr + o_w, mask=m_w, other=0.0).to(tl.float32)
            j = tl.load(j_ptr + o_w, mask=m_w, other=0.0).to(tl.float32)
            k = tl.load(k_ptr + o_w, mask=m_w, other=0.0).to(tl.float32)
            r, i, j, k, inverse = _unit(r, i, j, k)
            if SCALE:
                entries = _rotation_entries(r, i, j, k)
                d_scale = zeros
                for n in tl.static_range(9):
                    d_scale += e[n] * entries[n]
                tl.store(p_d + 4 * groups * size, d_scale.to(dw_ptr.dtype.element_ty), mask=m_w)
                inverse *= tl.load(scale_ptr + o_w, mask=m_w, other=0.0).to(tl.float32)
            d = _unrotate(e, r, i, j, k, inverse)
        for n in tl.static_range(4):
            tl.store(p_d + n * groups * size, d[n].to(dw_ptr.dtype.element_ty), mask=m_w)
    if BIAS:  # noqa: SIM102
        if tile_i == 0:
            p_b = db_ptr + (split * groups + group) * 4 * outputs + o_o
            tl.store(p_b, b0.to(db_ptr.dtype.element_ty), mask=m_o)
            tl.store(p_b + outputs, b1.to(db_ptr.dtype.element_ty), mask=m_o)
            tl.store(p_b + 2 * outputs, b2.to(db_ptr.dtype.element_ty), mask=m_o)
            tl.store(p_b + 3 * outputs, b3.to(db_ptr.dtype.element_ty), mask=m_o)


@triton.jit
def _outer(e, lost, x, g, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the products of all components of x with all of g, as gradients of the 9 entries."""
    e11, e12, e13, e21, e22, e23, e31, e32, e33 = e
    l11, l12, l13, l21, l22, l23, l31, l32, l33 = lost
    if not HALF:
        e11, l11 = _add_dot(e11, l11, x[0], g[0], PRECISION)
        e12, l12 = _add_dot(e12, l12, x[0], g[1], PRECISION)
        e13, l13 = _add_dot(e13, l13, x[0], g[2], PRECISION)
    e21, l21 = _add_dot(e21, l21, x[1], g[0], PRECISION)
    e22, l22 = _add_dot(e22, l22, x[1], g[1], PRECISION)
    e23, l23 = _add_dot(e23, l23, x[1], g[2], PRECISION)
    e31, l31 = _add_dot(e31, l31, x[2], g[0], PRECISION)
    e32, l32 = _add_dot(e32, l32, x[2], g[1], PRECISION)
    e33, l33 = _add_dot(e33, l33, x[2], g[2], PRECISION)
    return (
        (e11, e12, e13, e21, e22, e23, e31, e32, e33),
        (l11, l12, l13, l21, l22, l23, l31, l32, l33),
    )


@triton.jit
def _add_dot(acc, lost, x, g, PRECISION: tl.constexpr):
    if PRECISION == "ieee":
        return kahan_add(acc, lost, tl.dot(x, g, input_precision=PRECISION))
    return tl.dot(x, g, acc, input_precision=PRECISION), lost


@triton.jit(do_not_specialize=["rows", "rows_per_split"])
def sums_kernel(
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
    """Column sums over parts of the rows."""
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
def reduce_kernel(
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
    """Adds the parts of one or two results, in a fixed order."""
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
