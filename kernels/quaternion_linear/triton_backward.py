"""Triton kernel of the gradients of a quaternion layer's weights, scale and bias.

Imported on first use only. Equation (3) of :mod:`.triton_algebra`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.reductions import kahan_add
from .triton_algebra import hamilton, operand, rotation_entries, rotation_gradient, unit_quaternion


@triton.jit(do_not_specialize=["rows"])
def weight_gradient_kernel(
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
    """Compute the gradients of a tile [BI, BO] of all weights, and the bias's."""
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
        # The component r of a rotation's output is the bias alone.
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
            g0 = operand(g0, dtype, PRECISION)
            g1 = operand(g1, dtype, PRECISION)
            g2 = operand(g2, dtype, PRECISION)
            g3 = operand(g3, dtype, PRECISION)
            if HALF:
                x2 = operand(tl.load(p_x, mask=m_x, other=0.0), dtype, PRECISION)
                x3 = operand(tl.load(p_x + x_c, mask=m_x, other=0.0), dtype, PRECISION)
                x0 = x2  # not used
                x1 = x2
            else:
                x1 = operand(tl.load(p_x + x_c, mask=m_x, other=0.0), dtype, PRECISION)
                x2 = operand(tl.load(p_x + 2 * x_c, mask=m_x, other=0.0), dtype, PRECISION)
                x3 = operand(tl.load(p_x + 3 * x_c, mask=m_x, other=0.0), dtype, PRECISION)
                x0 = x1  # not used
                if not ROTATION:
                    x0 = operand(tl.load(p_x, mask=m_x, other=0.0), dtype, PRECISION)
            if ROTATION:
                e, e_lost = _outer(e, e_lost, (x1, x2, x3), (g1, g2, g3), HALF, PRECISION)
            elif PRECISION == "ieee":
                tile = hamilton(
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
                d = hamilton(
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
            r, i, j, k, inverse = unit_quaternion(r, i, j, k)
            if SCALE:
                entries = rotation_entries(r, i, j, k)
                d_scale = zeros
                for n in tl.static_range(9):
                    d_scale += e[n] * entries[n]
                tl.store(p_d + 4 * groups * size, d_scale.to(dw_ptr.dtype.element_ty), mask=m_w)
                inverse *= tl.load(scale_ptr + o_w, mask=m_w, other=0.0).to(tl.float32)
            d = rotation_gradient(e, r, i, j, k, inverse)
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
    """Accumulate the products of all components of x with all of g: gradients of the 9 entries."""
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
    """Accumulate x @ g, with compensation in full fp32."""
    if PRECISION == "ieee":
        return kahan_add(acc, lost, tl.dot(x, g, input_precision=PRECISION))
    return tl.dot(x, g, acc, input_precision=PRECISION), lost
