"""Triton kernel of the depthwise convolution with normalisation: equations of :mod:`.op`.

Imported on first use only. A program holds all channels of BN strips of STRIP pixels, side by side
in a row of the output, and goes down ROWS rows. Of a row of the input it loads each pixel that a
strip meets once, STRIP + 6 of them, and the seven taps of that row; a strip's sums stay in
registers, fp32, until they are normalised there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def depthwise_norm_kernel(
    x_ptr,  # [B, H, W, C]
    w_ptr,  # [49, C]
    bias_ptr,  # [C]; BIAS_MAP: [H, W, C]
    g_ptr,  # [C] or None: the norm's weight
    h_ptr,  # [C] or None: the norm's bias
    out_ptr,  # [B, H, W, C]
    height,
    width,
    C: tl.constexpr,
    BC: tl.constexpr,
    STRIP: tl.constexpr,  # 7 or 4
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS_MAP: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute equations (1) and (2) at BN strips in each of ROWS rows."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    across = tl.cdiv(width, STRIP * BN)
    first = tl.program_id(0) // across * ROWS
    o_col = (tl.program_id(0) % across * BN + tl.arange(0, BN)) * STRIP
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    image = tl.program_id(1).to(tl.int64) * height * width * C
    x_ptr += image
    out_ptr += image
    for row in range(first, tl.minimum(first + ROWS, height)):
        acc0 = tl.zeros((BN, BC), tl.float32)
        acc1, acc2, acc3, acc4, acc5, acc6 = acc0, acc0, acc0, acc0, acc0, acc0
        for i in range(tl.maximum(3 - row, 0), tl.minimum(height + 3 - row, 7)):
            p_w = w_ptr + i * 7 * C + o_c
            w0 = _load_tap(p_w, m_c)
            w1 = _load_tap(p_w + C, m_c)
            w2 = _load_tap(p_w + 2 * C, m_c)
            w3 = _load_tap(p_w + 3 * C, m_c)
            w4 = _load_tap(p_w + 4 * C, m_c)
            w5 = _load_tap(p_w + 5 * C, m_c)
            w6 = _load_tap(p_w + 6 * C, m_c)
            p_x = x_ptr + ((row + i - 3) * width + o_col - 3)[:, None] * C + o_c[None, :]
            for u in tl.static_range(STRIP + 6):
                m_x = (o_col + (u - 3) >= 0) & (o_col + (u - 3) < width)
                b_x = tl.load(p_x + u * C, mask=m_x[:, None] & m_c[None, :], other=0.0)
                b_x = b_x.to(tl.float32)
                acc0 = _add_tap(acc0, b_x, u, w0, w1, w2, w3, w4, w5, w6)
                acc1 = _add_tap(acc1, b_x, u - 1, w0, w1, w2, w3, w4, w5, w6)
                acc2 = _add_tap(acc2, b_x, u - 2, w0, w1, w2, w3, w4, w5, w6)
                acc3 = _add_tap(acc3, b_x, u - 3, w0, w1, w2, w3, w4, w5, w6)
                if STRIP > 4:
                    acc4 = _add_tap(acc4, b_x, u - 4, w0, w1, w2, w3, w4, w5, w6)
                    acc5 = _add_tap(acc5, b_x, u - 5, w0, w1, w2, w3, w4, w5, w6)
                    acc6 = _add_tap(acc6, b_x, u - 6, w0, w1, w2, w3, w4, w5, w6)
        o_pixel = row * width + o_col
        acc0 = _add_bias(acc0, bias_ptr, o_pixel, o_col, width, o_c, m_c, C, BIAS_MAP)
        acc1 = _add_bias(acc1, bias_ptr, o_pixel + 1, o_col + 1, width, o_c, m_c, C, BIAS_MAP)
        acc2 = _add_bias(acc2, bias_ptr, o_pixel + 2, o_col + 2, width, o_c, m_c, C, BIAS_MAP)
        acc3 = _add_bias(acc3, bias_ptr, o_pixel + 3, o_col + 3, width, o_c, m_c, C, BIAS_MAP)
        if STRIP > 4:
            acc4 = _add_bias(acc4, bias_ptr, o_pixel + 4, o_col + 4, width, o_c, m_c, C, BIAS_MAP)
            acc5 = _add_bias(acc5, bias_ptr, o_pixel + 5, o_col + 5, width, o_c, m_c, C, BIAS_MAP)
            acc6 = _add_bias(acc6, bias_ptr, o_pixel + 6, o_col + 6, width, o_c, m_c, C, BIAS_MAP)
            # One pass over the warps for all pixels of a strip, not one for each.
            strip = (acc0, acc1, acc2, acc3, acc4, acc5, acc6)
            s0, s1, s2, s3, s4, s5, s6 = tl.reduce(strip, 1, _add7)
            acc4 = _centered(acc4, s4, m_c, C)
            acc5 = _centered(acc5, s5, m_c, C)
            acc6 = _centered(acc6, s6, m_c, C)
        else:
            s0, s1, s2, s3 = tl.reduce((acc0, acc1, acc2, acc3), 1, _add4)
        acc0 = _centered(acc0, s0, m_c, C)
        acc1 = _centered(acc1, s1, m_c, C)
        acc2 = _centered(acc2, s2, m_c, C)
        acc3 = _centered(acc3, s3, m_c, C)
        if STRIP > 4:
            squares = (
                acc0 * acc0,
                acc1 * acc1,
                acc2 * acc2,
                acc3 * acc3,
                acc4 * acc4,
                acc5 * acc5,
                acc6 * acc6,
            )
            q0, q1, q2, q3, q4, q5, q6 = tl.reduce(squares, 1, _add7)
        else:
            four = (acc0 * acc0, acc1 * acc1, acc2 * acc2, acc3 * acc3)
            q0, q1, q2, q3 = tl.reduce(four, 1, _add4)
        p_out = out_ptr + o_pixel[:, None] * C + o_c[None, :]
        _store(p_out, acc0, q0, o_col < width, g_ptr, h_ptr, o_c, m_c, C, EPS, FACTOR)
        _store(p_out + C, acc1, q1, o_col + 1 < width, g_ptr, h_ptr, o_c, m_c, C, EPS, FACTOR)
        _store(p_out + 2 * C, acc2, q2, o_col + 2 < width, g_ptr, h_ptr, o_c, m_c, C, EPS, FACTOR)
        _store(p_out + 3 * C, acc3, q3, o_col + 3 < width, g_ptr, h_ptr, o_c, m_c, C, EPS, FACTOR)
        if STRIP > 4:
            _store(
                p_out + 4 * C, acc4, q4, o_col + 4 < width, g_ptr, h_ptr, o_c, m_c, C, EPS, FACTOR
            )
            _store(
                p_out + 5 * C, acc5, q5, o_col + 5 < width, g_ptr, h_ptr, o_c, m_c, C, EPS, FACTOR
            )
            _store(
                p_out + 6 * C, acc6, q6, o_col + 6 < width, g_ptr, h_ptr, o_c, m_c, C, EPS, FACTOR
            )


@triton.jit
def _load_tap(p_w, m_c):
    """Load one tap of every channel."""
    return tl.load(p_w, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _add_tap(acc, b_x, j: tl.constexpr, w0, w1, w2, w3, w4, w5, w6):
    """Add w[j] · x where the row of taps has such a one."""
    if j == 0:
        acc += b_x * w0[None, :]
    elif j == 1:
        acc += b_x * w1[None, :]
    elif j == 2:
        acc += b_x * w2[None, :]
    elif j == 3:
        acc += b_x * w3[None, :]
    elif j == 4:
        acc += b_x * w4[None, :]
    elif j == 5:
        acc += b_x * w5[None, :]
    elif j == 6:
        acc += b_x * w6[None, :]
    return acc


@triton.jit
def _add_bias(acc, bias_ptr, o_pixel, o_col, width, o_c, m_c, C: tl.constexpr, MAP: tl.constexpr):
    """Add the bias of the channels, or of the pixels' channels; zero beyond the channels."""
    if MAP:
        p_bias = bias_ptr + o_pixel[:, None] * C + o_c[None, :]
        mask = (o_col < width)[:, None] & m_c[None, :]
        return acc + tl.load(p_bias, mask=mask, other=0.0).to(tl.float32)
    return acc + tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _centered(acc, sums, m_c, C: tl.constexpr):
    """Subtract the mean over channels."""
    return tl.where(m_c[None, :], acc - (sums * (1 / C))[:, None], 0.0)


@triton.jit
def _store(
    p_out,
    acc,
    squares,
    m_pixel,
    g_ptr,
    h_ptr,
    o_c,
    m_c,
    C: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Scale to a variance of one, apply the norm's weight and bias, multiply and store."""
    y = acc * (tl.rsqrt(squares * (1 / C) + EPS) * FACTOR)[:, None]
    if g_ptr is not None:
        g = tl.load(g_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + o_c, mask=m_c, other=0.0).to(tl.float32) * FACTOR
        y = y * g[None, :] + h[None, :]
    tl.store(p_out, y.to(p_out.dtype.element_ty), mask=m_pixel[:, None] & m_c[None, :])


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    """Add four pairs."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add7(a0, a1, a2, a3, a4, a5, a6, b0, b1, b2, b3, b4, b5, b6):
    """Add seven pairs."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6
