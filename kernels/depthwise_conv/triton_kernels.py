"""Kernels of the depthwise convolution.

With the channels last, x [B, H, W, C], y and g [B, H', W', C], w [K·K, C], a tap t = (i, j), stride
S and padding P:

    (1)  y[b, h, w]  = bias + Σ_t w[t] · x[b, h·S + i - P, w·S + j - P]
    (2)  dx[b, h, w] = Σ_t w[t] · g[b, (h + P - i) / S, (w + P - j) / S]   where both divide
    (3)  dw[t]       = Σ_{b,h,w} g[b, h, w] · x[b, h·S + i - P, w·S + j - P]

(2) with a stride of 1 is (1) of g, with the taps reversed and K - 1 - P for P.

In (1) and (3) a thread has strips of four output pixels that are neighbours in a row. Of an input
row it loads the 3·S + K pixels that the strip meets, each once, where a pixel at a time would load
4·K; sums are fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

STRIP = 4  # output pixels of a strip; the kernels name their values


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width"])
def forward_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    height,
    width,
    out_height,
    out_width,
    channels,
    K: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    REVERSED: tl.constexpr,
    BIAS: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute equation (1) at BN strips of one image and BC channels."""
    strips = tl.cdiv(out_width, 4)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    image = tl.program_id(2).to(tl.int64)
    m_n, m_c = o_n < out_height * strips, o_c < channels
    o_row, o_col = o_n // strips, (o_n % strips) * 4
    top, left = o_row * S - P, o_col * S - P
    x_ptr += image * height * width * channels
    y_ptr += image * out_height * out_width * channels
    acc0 = tl.zeros((BN, BC), tl.float32)
    if BIAS:
        acc0 += tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    acc1, acc2, acc3 = acc0, acc0, acc0
    for i in range(K):  # not unrolled: fewer registers, and a third of the time to compile
        row = top + i
        m_row = m_n & (row >= 0) & (row < height)
        p_x = x_ptr + (row * width + left)[:, None] * channels + o_c[None, :]
        p_w = w_ptr + (K * K - 1 - i * K if REVERSED else i * K) * channels + o_c
        step = -channels if REVERSED else channels
        for u in tl.static_range(3 * S + K):
            m = m_row & (left + u >= 0) & (left + u < width)
            b_x = tl.load(p_x + u * channels, mask=m[:, None] & m_c[None, :], other=0.0)
            b_x = b_x.to(tl.float32)
            acc0 = _add_tap(acc0, b_x, p_w, step, m_c, u, K)
            acc1 = _add_tap(acc1, b_x, p_w, step, m_c, u - S, K)
            acc2 = _add_tap(acc2, b_x, p_w, step, m_c, u - 2 * S, K)
            acc3 = _add_tap(acc3, b_x, p_w, step, m_c, u - 3 * S, K)
    p_y = y_ptr + (o_row * out_width + o_col)[:, None] * channels + o_c[None, :]
    kind = y_ptr.dtype.element_ty
    m = m_n[:, None] & m_c[None, :]
    tl.store(p_y, acc0.to(kind), mask=m)
    tl.store(p_y + channels, acc1.to(kind), mask=m & (o_col + 1 < out_width)[:, None])
    tl.store(p_y + 2 * channels, acc2.to(kind), mask=m & (o_col + 2 < out_width)[:, None])
    tl.store(p_y + 3 * channels, acc3.to(kind), mask=m & (o_col + 3 < out_width)[:, None])


@triton.jit
def _add_tap(acc, b_x, p_w, step, m_c, j: tl.constexpr, K: tl.constexpr):
    """Add w[j] · x where the row of taps has such a one."""
    if j >= 0 and j < K:
        b_w = tl.load(p_w + j * step, mask=m_c, other=0.0)
        acc += b_x * b_w.to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width"])
def input_gradient_kernel(
    g_ptr,
    w_ptr,
    dx_ptr,
    height,
    width,
    out_height,
    out_width,
    channels,
    stride,
    K: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute equation (2) at BP pixels of one image and BC channels.

    The pixels have the same row and column modulo S, so that the same taps meet them.

    ``stride`` is S again, as a number that the compiler does not know. With S itself it knows how
    small the remainders are and computes both as halves of one register; of that code, for K 7,
    S 3 and P 6, ptxas 12.8 made a program with other results (0.5 of the gradient's norm).
    """
    across = (width + S - 1) // S
    pixels = ((height + S - 1) // S) * across
    o_p = tl.program_id(0) * BP + tl.arange(0, BP)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    image = (tl.program_id(2) // (S * S)).to(tl.int64)
    first_row, first_col = (tl.program_id(2) // S) % stride, tl.program_id(2) % stride
    o_row, o_col = (o_p // across) * S + first_row, (o_p % across) * S + first_col
    m_p = (o_p < pixels) & (o_row < height) & (o_col < width)
    m_c = o_c < channels
    # The first tap that meets these pixels; those after it follow at distances of S.
    first_i, first_j = (first_row + P) % stride, (first_col + P) % stride
    top, left = (o_row + P - first_i) // S, (o_col + P - first_j) // S
    g_ptr += image * out_height * out_width * channels
    dx_ptr += image * height * width * channels
    acc = tl.zeros((BP, BC), tl.float32)
    for a in tl.static_range((K + S - 1) // S):
        for b in tl.static_range((K + S - 1) // S):
            i, j = first_i + a * S, first_j + b * S
            row, col = top - a, left - b
            m = m_p & (row >= 0) & (col >= 0) & (row < out_height) & (col < out_width)
            m = m & (i < K) & (j < K)
            p_g = g_ptr + (row * out_width + col)[:, None] * channels + o_c[None, :]
            b_g = tl.load(p_g, mask=m[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            p_w = w_ptr + (i * K + j) * channels + o_c
            b_w = tl.load(p_w, mask=m_c & (i < K) & (j < K), other=0.0)
            acc += b_g * b_w.to(tl.float32)[None, :]
    p_dx = dx_ptr + (o_row * width + o_col)[:, None] * channels + o_c[None, :]
    tl.store(p_dx, acc.to(dx_ptr.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["batch", "height", "width", "out_height", "out_width"])
def weight_gradient_kernel(
    g_ptr,
    x_ptr,
    parts_ptr,
    batch,
    height,
    width,
    out_height,
    out_width,
    channels,
    K: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute a part of equation (3) for one row of taps and BC channels.

    Parts share the strips of all images, BN at a time: part p of n has p, p + n, and so on. It is
    written to parts [n, K·K, C] fp32.
    """
    part, o_c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    i = tl.program_id(2)
    m_c = o_c < channels
    strips = tl.cdiv(out_width, 4)
    per_image = tl.cdiv(out_height * strips, BN)
    acc0 = tl.zeros((BN, BC), tl.float32)
    acc1, acc2, acc3, acc4 = acc0, acc0, acc0, acc0
    acc5, acc6, acc7, acc8 = acc0, acc0, acc0, acc0
    for tile in range(part, batch * per_image, tl.num_programs(0)):
        image = (tile // per_image).to(tl.int64)
        o_n = (tile % per_image) * BN + tl.arange(0, BN)
        o_row, o_col = o_n // strips, (o_n % strips) * 4
        row, left = o_row * S - P + i, o_col * S - P
        m_n = (o_row < out_height) & (row >= 0) & (row < height)
        p_g = g_ptr + image * out_height * out_width * channels
        p_g += (o_row * out_width + o_col)[:, None] * channels + o_c[None, :]
        p_x = x_ptr + image * height * width * channels
        p_x += (row * width + left)[:, None] * channels + o_c[None, :]
        m = m_n[:, None] & m_c[None, :]
        g0 = tl.load(p_g, mask=m, other=0.0).to(tl.float32)
        m_1 = m & (o_col + 1 < out_width)[:, None]
        g1 = tl.load(p_g + channels, mask=m_1, other=0.0).to(tl.float32)
        m_2 = m & (o_col + 2 < out_width)[:, None]
        g2 = tl.load(p_g + 2 * channels, mask=m_2, other=0.0).to(tl.float32)
        m_3 = m & (o_col + 3 < out_width)[:, None]
        g3 = tl.load(p_g + 3 * channels, mask=m_3, other=0.0).to(tl.float32)
        for u in tl.static_range(3 * S + K):
            m_x = m & ((left + u >= 0) & (left + u < width))[:, None]
            b_x = tl.load(p_x + u * channels, mask=m_x, other=0.0).to(tl.float32)
            acc0 = _add_pixels(acc0, b_x, g0, g1, g2, g3, u, S)
            if K > 1:
                acc1 = _add_pixels(acc1, b_x, g0, g1, g2, g3, u - 1, S)
            if K > 2:
                acc2 = _add_pixels(acc2, b_x, g0, g1, g2, g3, u - 2, S)
            if K > 3:
                acc3 = _add_pixels(acc3, b_x, g0, g1, g2, g3, u - 3, S)
            if K > 4:
                acc4 = _add_pixels(acc4, b_x, g0, g1, g2, g3, u - 4, S)
            if K > 5:
                acc5 = _add_pixels(acc5, b_x, g0, g1, g2, g3, u - 5, S)
            if K > 6:
                acc6 = _add_pixels(acc6, b_x, g0, g1, g2, g3, u - 6, S)
            if K > 7:
                acc7 = _add_pixels(acc7, b_x, g0, g1, g2, g3, u - 7, S)
            if K > 8:
                acc8 = _add_pixels(acc8, b_x, g0, g1, g2, g3, u - 8, S)
    p_part = parts_ptr + (part.to(tl.int64) * K * K + i * K) * channels + o_c
    tl.store(p_part, tl.sum(acc0, 0), mask=m_c)
    if K > 1:
        tl.store(p_part + channels, tl.sum(acc1, 0), mask=m_c)
    if K > 2:
        tl.store(p_part + 2 * channels, tl.sum(acc2, 0), mask=m_c)
    if K > 3:
        tl.store(p_part + 3 * channels, tl.sum(acc3, 0), mask=m_c)
    if K > 4:
        tl.store(p_part + 4 * channels, tl.sum(acc4, 0), mask=m_c)
    if K > 5:
        tl.store(p_part + 5 * channels, tl.sum(acc5, 0), mask=m_c)
    if K > 6:
        tl.store(p_part + 6 * channels, tl.sum(acc6, 0), mask=m_c)
    if K > 7:
        tl.store(p_part + 7 * channels, tl.sum(acc7, 0), mask=m_c)
    if K > 8:
        tl.store(p_part + 8 * channels, tl.sum(acc8, 0), mask=m_c)


@triton.jit
def _add_pixels(acc, b_x, g0, g1, g2, g3, first: tl.constexpr, S: tl.constexpr):
    """Add g · x for the pixel of a strip whose tap meets x: pixel p if ``first`` is p·S."""
    if first == 0:
        acc += g0 * b_x
    if first == S:
        acc += g1 * b_x
    if first == 2 * S:
        acc += g2 * b_x
    if first == 3 * S:
        acc += g3 * b_x
    return acc
