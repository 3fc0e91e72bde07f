"""Kernels of the depthwise convolution.

With the channels last, x [B, H, W, C], y and g [B, H', W', C], w [K·K, C], a tap t = (i, j), stride
S and padding P:

    (1)  y[b, h, w]  = bias + Σ_t w[t] · x[b, h·S + i - P, w·S + j - P]
    (2)  dx[b, h, w] = Σ_t w[t] · g[b, (h + P - i) / S, (w + P - j) / S]   where both divide
    (3)  dw[t]       = Σ_{b,h,w} g[b, h, w] · x[b, h·S + i - P, w·S + j - P]

A program computes a tile of pixels and channels in fp32 and loads the tile's neighbours once for
each tap, of which all but the first come from the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
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
    BIAS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute equation (1) at BP pixels of one image and BC channels."""
    o_p = tl.program_id(0) * BP + tl.arange(0, BP)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    image = tl.program_id(2).to(tl.int64)
    m_p, m_c = o_p < out_height * out_width, o_c < channels
    top, left = (o_p // out_width) * S - P, (o_p % out_width) * S - P
    x_ptr += image * height * width * channels
    y_ptr += image * out_height * out_width * channels
    acc = tl.zeros((BP, BC), tl.float32)
    if BIAS:
        acc += tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(K):
        for j in tl.static_range(K):
            row, col = top + i, left + j
            m = m_p & (row >= 0) & (row < height) & (col >= 0) & (col < width)
            p_x = x_ptr + (row * width + col)[:, None] * channels + o_c[None, :]
            b_x = tl.load(p_x, mask=m[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            b_w = tl.load(w_ptr + (i * K + j) * channels + o_c, mask=m_c, other=0.0)
            acc += b_x * b_w.to(tl.float32)[None, :]
    p_y = y_ptr + o_p[:, None] * channels + o_c[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


@triton.jit
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


@triton.jit
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
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute a part of equation (3) for one tap and BC channels.

    Parts share the tiles of all images: part p of n has tiles p, p + n, and so on. It is written to
    parts [n, K·K, C] fp32. (One row of taps in a program, which loads g once for all of them, was
    slower on an H100: 2.1 against 1.6 ms for the layers of an EfficientNet-Lite0 at batch 32.)
    """
    part, o_c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    i = tl.program_id(2) // K
    j = tl.program_id(2) % K
    m_c = o_c < channels
    pixels = out_height * out_width
    per_image = tl.cdiv(pixels, BP)
    acc = tl.zeros((BP, BC), tl.float32)
    for tile in range(part, batch * per_image, tl.num_programs(0)):
        image = (tile // per_image).to(tl.int64)
        o_p = (tile % per_image) * BP + tl.arange(0, BP)
        m_p = o_p < pixels
        row, col = (o_p // out_width) * S - P + i, (o_p % out_width) * S - P + j
        m = m_p & (row >= 0) & (row < height) & (col >= 0) & (col < width)
        p_g = g_ptr + image * pixels * channels + o_p[:, None] * channels + o_c[None, :]
        p_x = x_ptr + image * height * width * channels
        p_x += (row * width + col)[:, None] * channels + o_c[None, :]
        mask = m[:, None] & m_c[None, :]
        b_g = tl.load(p_g, mask=mask, other=0.0).to(tl.float32)
        b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
        acc += b_g * b_x
    o_part = part.to(tl.int64) * K * K + tl.program_id(2)
    tl.store(parts_ptr + o_part * channels + o_c, tl.sum(acc, 0), mask=m_c)
