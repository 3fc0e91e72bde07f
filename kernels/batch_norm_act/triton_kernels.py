"""Kernels of batch norm in training with an activation.

x, y and g are [M, L]: with the channels last, an image's pixels are rows, and R of them lie side by
side in a row here, L = R·C, so that rows are whole blocks of BC values. M·R = n values a channel.

    (1)  μ = Σ x / n,   σ² = Σ x² / n - μ²,   r = 1 / sqrt(σ² + ε)      x less a guess of μ
    (2)  y = act(z),    z = (x - μ) · r · w + b
    (3)  d = g · act'(z),   db = Σ d,   dw = r · Σ d · (x - μ)
    (4)  dx = r · w · (d - db / n - (x - μ) · r · dw / n)

(1) and (3) are sums of programs, which a kernel adds. The guess is the mean of SAMPLE pixels over
all images: squares of what is left cancel little, where one pixel, a dark corner say, may lie
several deviations from the mean. Heights and numbers of pixels are not specialized: all
layers of a network share their compiled kernels. What a channel needs is in ``channels``: μ, r · w,
b, r, [4, C] fp32; of the backward, in ``sums``: db / n and r · dw / n.
"""

from __future__ import annotations

import triton
import triton.language as tl

SAMPLE = tl.constexpr(16)  # pixels


@triton.jit
def _guess(x_ptr, pixels, channels, o_c, m_c):
    """Return the mean of some pixels of a channel, [BC]: all of them where there are few."""
    o_p = tl.arange(0, SAMPLE)
    m = (o_p < pixels)[:, None] & m_c[None, :]
    place = o_p.to(tl.int64) * tl.maximum(pixels // SAMPLE, 1)
    b_x = tl.load(x_ptr + place[:, None] * channels + o_c[None, :], mask=m, other=0.0)
    return tl.sum(b_x.to(tl.float32), 0) / tl.minimum(pixels, SAMPLE)


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    x_ptr, parts_ptr, rows, columns, channels, BR: tl.constexpr, BC: tl.constexpr
):
    """Add a part of the rows for equation (1): parts [n, 2, L], Σ and Σ of squares."""
    part, o_c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < columns
    b_guess = _guess(x_ptr, rows * (columns // channels), channels, o_c % channels, m_c)
    acc = tl.zeros((BR, BC), tl.float32)
    squares = tl.zeros((BR, BC), tl.float32)
    for start in range(part * BR, rows, tl.num_programs(0) * BR):
        o_r = start + tl.arange(0, BR)
        m = (o_r < rows)[:, None] & m_c[None, :]
        p_x = x_ptr + o_r.to(tl.int64)[:, None] * columns + o_c[None, :]
        b_x = tl.load(p_x, mask=m, other=0.0).to(tl.float32) - b_guess[None, :]
        b_x = tl.where(m, b_x, 0.0)
        acc += b_x
        squares += b_x * b_x
    p_part = parts_ptr + part.to(tl.int64) * 2 * columns + o_c
    tl.store(p_part, tl.sum(acc, 0), mask=m_c)
    tl.store(p_part + columns, tl.sum(squares, 0), mask=m_c)


@triton.jit(do_not_specialize=["parts", "repeats", "pixels"])
def finish_statistics_kernel(
    x_ptr,
    parts_ptr,
    w_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    channels_ptr,
    parts,
    repeats,
    channels,
    pixels,
    momentum,
    eps,
    RUNNING: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Add the parts of equation (1); keep μ, r · w and b; update the running statistics."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < channels
    total, squares = _add_parts(parts_ptr, parts, repeats, channels, o_c, m_c, BP, BC)
    n = pixels.to(tl.float32)
    mean = total / n
    var = tl.maximum(squares / n - mean * mean, 0.0)
    mean += _guess(x_ptr, pixels, channels, o_c, m_c)
    scale = 1.0 / tl.sqrt(var + eps) * tl.load(w_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(channels_ptr + o_c, mean, mask=m_c)
    tl.store(channels_ptr + channels + o_c, scale, mask=m_c)
    tl.store(channels_ptr + 2 * channels + o_c, bias, mask=m_c)
    tl.store(channels_ptr + 3 * channels + o_c, 1.0 / tl.sqrt(var + eps), mask=m_c)
    if RUNNING:
        old = tl.load(mean_ptr + o_c, mask=m_c, other=0.0)
        tl.store(mean_ptr + o_c, old + momentum * (mean - old), mask=m_c)
        old = tl.load(var_ptr + o_c, mask=m_c, other=0.0)
        unbiased = var * (n / tl.maximum(n - 1.0, 1.0))
        tl.store(var_ptr + o_c, old + momentum * (unbiased - old), mask=m_c)


@triton.jit
def _add_parts(parts_ptr, parts, repeats, channels, o_c, m_c, BP: tl.constexpr, BC: tl.constexpr):
    """Add the two sums of all programs and of the pixels side by side; each is [BC]."""
    first = tl.zeros((BP, BC), tl.float32)
    second = tl.zeros((BP, BC), tl.float32)
    for start in range(0, parts * repeats, BP):
        o_p = start + tl.arange(0, BP)
        m = (o_p < parts * repeats)[:, None] & m_c[None, :]
        place = (o_p // repeats) * 2 * repeats + o_p % repeats
        p_part = parts_ptr + place.to(tl.int64)[:, None] * channels + o_c[None, :]
        first += tl.load(p_part, mask=m, other=0.0)
        second += tl.load(p_part + repeats * channels, mask=m, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=["rows"])
def normalize_kernel(
    x_ptr,
    channels_ptr,
    y_ptr,
    rows,
    columns,
    channels,
    ACT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute equation (2) for BR rows and BC columns."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < columns
    m = (o_r < rows)[:, None] & m_c[None, :]
    place = o_r.to(tl.int64)[:, None] * columns + o_c[None, :]
    b_x = tl.load(x_ptr + place, mask=m, other=0.0).to(tl.float32)
    p_c = channels_ptr + o_c % channels
    mean = tl.load(p_c, mask=m_c, other=0.0)
    scale = tl.load(p_c + channels, mask=m_c, other=0.0)
    bias = tl.load(p_c + 2 * channels, mask=m_c, other=0.0)
    z = (b_x - mean[None, :]) * scale[None, :] + bias[None, :]
    if ACT == "relu":
        z = tl.maximum(z, 0.0)
    if ACT == "relu6":
        z = tl.minimum(tl.maximum(z, 0.0), 6.0)
    if ACT == "silu":
        z = z / (1.0 + tl.exp(-z))
    tl.store(y_ptr + place, z.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def _before_activation(b_g, z, ACT: tl.constexpr):
    """Return g · act'(z)."""
    if ACT == "relu":
        b_g = tl.where(z > 0.0, b_g, 0.0)
    if ACT == "relu6":
        b_g = tl.where((z > 0.0) & (z < 6.0), b_g, 0.0)
    if ACT == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        b_g = b_g * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return b_g


@triton.jit(do_not_specialize=["rows"])
def gradient_sums_kernel(
    g_ptr,
    x_ptr,
    channels_ptr,
    parts_ptr,
    rows,
    columns,
    channels,
    ACT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Add a part of the rows for equation (3): parts [n, 2, L], Σ d and Σ d · (x - μ)."""
    part, o_c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < columns
    p_c = channels_ptr + o_c % channels
    mean = tl.load(p_c, mask=m_c, other=0.0)
    scale = tl.load(p_c + channels, mask=m_c, other=0.0)
    bias = tl.load(p_c + 2 * channels, mask=m_c, other=0.0)
    acc = tl.zeros((BR, BC), tl.float32)
    products = tl.zeros((BR, BC), tl.float32)
    for start in range(part * BR, rows, tl.num_programs(0) * BR):
        o_r = start + tl.arange(0, BR)
        m = (o_r < rows)[:, None] & m_c[None, :]
        place = o_r.to(tl.int64)[:, None] * columns + o_c[None, :]
        b_x = tl.load(x_ptr + place, mask=m, other=0.0).to(tl.float32) - mean[None, :]
        b_g = tl.load(g_ptr + place, mask=m, other=0.0).to(tl.float32)
        b_g = _before_activation(b_g, b_x * scale[None, :] + bias[None, :], ACT)
        acc += b_g
        products += b_g * b_x
    p_part = parts_ptr + part.to(tl.int64) * 2 * columns + o_c
    tl.store(p_part, tl.sum(acc, 0), mask=m_c)
    tl.store(p_part + columns, tl.sum(products, 0), mask=m_c)


@triton.jit(do_not_specialize=["parts", "repeats"])
def finish_gradient_sums_kernel(
    parts_ptr,
    channels_ptr,
    dw_ptr,
    db_ptr,
    sums_ptr,
    parts,
    repeats,
    channels,
    n,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Add the parts of equation (3); keep dw, db, and sums [2, C]: db / n and r · dw / n."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < channels
    total, products = _add_parts(parts_ptr, parts, repeats, channels, o_c, m_c, BP, BC)
    r = tl.load(channels_ptr + 3 * channels + o_c, mask=m_c, other=0.0)
    tl.store(db_ptr + o_c, total.to(db_ptr.dtype.element_ty), mask=m_c)
    tl.store(dw_ptr + o_c, (products * r).to(dw_ptr.dtype.element_ty), mask=m_c)
    tl.store(sums_ptr + o_c, total / n, mask=m_c)
    tl.store(sums_ptr + channels + o_c, products * r * r / n, mask=m_c)


@triton.jit(do_not_specialize=["rows"])
def input_gradient_kernel(
    g_ptr,
    x_ptr,
    channels_ptr,
    sums_ptr,
    dx_ptr,
    rows,
    columns,
    channels,
    ACT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Compute equation (4) for BR rows and BC columns."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < columns
    m = (o_r < rows)[:, None] & m_c[None, :]
    place = o_r.to(tl.int64)[:, None] * columns + o_c[None, :]
    b_x = tl.load(x_ptr + place, mask=m, other=0.0).to(tl.float32)
    b_g = tl.load(g_ptr + place, mask=m, other=0.0).to(tl.float32)
    p_c, p_s = channels_ptr + o_c % channels, sums_ptr + o_c % channels
    b_x -= tl.load(p_c, mask=m_c, other=0.0)[None, :]
    scale = tl.load(p_c + channels, mask=m_c, other=0.0)[None, :]
    bias = tl.load(p_c + 2 * channels, mask=m_c, other=0.0)[None, :]
    b_g = _before_activation(b_g, b_x * scale + bias, ACT)
    b_g -= tl.load(p_s, mask=m_c, other=0.0)[None, :]
    b_g -= b_x * tl.load(p_s + channels, mask=m_c, other=0.0)[None, :]
    tl.store(dx_ptr + place, (b_g * scale).to(dx_ptr.dtype.element_ty), mask=m)
