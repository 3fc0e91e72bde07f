"""Triton kernels of LayerNorm and how they are launched; imported on first use only.

Each pass reads and writes every number once. A program of the backward takes every P-th group of
rows, so that it can add up its share of the parameters' gradients in registers; a small kernel adds
the P shares, always in the same order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, block, device_of
from ..common.reductions import sum_parts


@triton.jit
def row_offsets(row, inner, outer_stride, row_stride):
    """Where rows begin: row ``i`` of all is row ``i % inner`` of the outer index ``i // inner``."""
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * row_stride


@triton.jit
def normalised(x, mask, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Rows [BR, BC] with mean 0 and deviation 1, 0 beyond the mask; their mean, 1 / deviation."""
    # Divided before the sum: a quotient would become part of the subtraction, rounded in another
    # way, wherever nobody asks for the mean as well.
    mean = tl.sum(x * (1 / WIDTH), 1)
    centered = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1) / WIDTH + EPS)
    return centered * rstd[:, None], mean, rstd


@triton.jit
def gradient_behind(g, normal, rstd, WIDTH: tl.constexpr):
    """The gradient of rows, given that of the normalised ones."""
    along = tl.sum(g * normal, 1) / WIDTH
    level = tl.sum(g, 1) / WIDTH
    return (g - normal * along[:, None] - level[:, None]) * rstd[:, None]


@triton.jit
def layer_norm_kernel(
    x_ptr,  # [rows, WIDTH]
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH]
    out_ptr,  # [rows, WIDTH]
    stats_ptr,  # [2, rows] fp32, mean and 1 / deviation, or None
    branch_ptr,  # [rows, WIDTH] or None: added to x first
    added_ptr,  # [WIDTH] or None
    sum_ptr,  # [rows, WIDTH]: x + branch + added, or None
    rows,
    inner,
    outer_stride,
    STRIDE: tl.constexpr,  # between rows; a constant, so that the compiler knows its factors
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    m_r = o_r < rows
    m_c = o_c < WIDTH
    mask = m_r[:, None] & m_c[None, :]
    p_x = x_ptr + row_offsets(o_r, inner, outer_stride, STRIDE)[:, None] + o_c[None, :]
    x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    offsets = o_r.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
    if branch_ptr is not None:
        x += tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    normal, mean, rstd = normalised(x, mask, WIDTH, EPS)
    y = normal * weight[None, :] + bias[None, :]
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
    if stats_ptr is not None:
        tl.store(stats_ptr + o_r, mean, mask=m_r)
        tl.store(stats_ptr + tl.cast(rows, tl.int64) + o_r, rstd, mask=m_r)
    if sum_ptr is not None:
        total = x
        if added_ptr is not None:
            total += tl.load(added_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        tl.store(sum_ptr + offsets, total.to(sum_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_backward_kernel(
    g_ptr,  # [rows, WIDTH]: gradient of the output
    x_ptr,  # [rows, WIDTH]
    weight_ptr,  # [WIDTH]
    stats_ptr,  # [2, rows]
    residual_ptr,  # [rows, WIDTH], contiguous, or None: added to dx
    dx_ptr,  # [rows, WIDTH] or None
    sums_ptr,  # [programs, sums_width] fp32: sums of g · normalised x, g, residual; or None
    rows,
    g_inner,
    g_outer_stride,
    x_inner,
    x_outer_stride,
    sums_width,
    G_STRIDE: tl.constexpr,  # between rows; a constant, so that the compiler knows its factors
    X_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_c = tl.arange(0, BC)
    m_c = o_c < WIDTH
    weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    dweight = tl.zeros((BC,), tl.float32)
    dbias = tl.zeros((BC,), tl.float32)
    dresidual = tl.zeros((BC,), tl.float32)
    # The next rows are loaded while these are computed, where STAGES is more than 1.
    for row in tl.range(tl.program_id(0) * BR, rows, tl.num_programs(0) * BR, num_stages=STAGES):
        o_r = row + tl.arange(0, BR)
        m_r = o_r < rows
        mask = m_r[:, None] & m_c[None, :]
        g_rows = row_offsets(o_r, g_inner, g_outer_stride, G_STRIDE)
        x_rows = row_offsets(o_r, x_inner, x_outer_stride, X_STRIDE)
        g = tl.load(g_ptr + g_rows[:, None] + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_rows[:, None] + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + o_r, mask=m_r, other=0.0)
        rstd = tl.load(stats_ptr + tl.cast(rows, tl.int64) + o_r, mask=m_r, other=0.0)
        offsets = o_r.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normal = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        if dx_ptr is not None:
            dx = gradient_behind(g * weight[None, :], normal, rstd, WIDTH)
            if residual_ptr is not None:
                dx += residual
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if sums_ptr is not None:
            dweight += tl.sum(g * normal, 0)
            dbias += tl.sum(g, 0)
            if residual_ptr is not None:
                dresidual += tl.sum(residual, 0)
    if sums_ptr is not None:
        p_sums = sums_ptr + tl.program_id(0).to(tl.int64) * sums_width + o_c
        tl.store(p_sums, dweight, mask=m_c)
        tl.store(p_sums + WIDTH, dbias, mask=m_c)
        if residual_ptr is not None:
            tl.store(p_sums + 2 * WIDTH, dresidual, mask=m_c)


@triton.jit
def reduce_kernel(
    parts_ptr,  # [parts, width] fp32
    out_ptr,  # [width]
    parts,
    width,
    BP: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    sum_parts(parts_ptr, out_ptr, parts, width, o_c, BP, BC)


class Rows(NamedTuple):
    """How the rows of a tensor lie in memory; the numbers of a row lie side by side."""

    count: int
    inner: int
    outer_stride: int
    row_stride: int


def rows_of(x: Tensor) -> tuple[Tensor, Rows]:
    """The rows of x [..., C]; a copy only where the kernels cannot read its strides.

    They can read tokens [B, N, C] without some of the first, and gradients that a mean over tokens
    has expanded.
    """
    width = x.shape[-1]
    count = x.numel() // width
    if not x.is_contiguous():
        if x.dim() == 3 and x.stride(2) == 1:
            return x, Rows(count, x.shape[1], x.stride(0), x.stride(1))
        x = x.contiguous()
    return x, Rows(count, count, 0, width)


class Tile(NamedTuple):
    """Launch configuration: rows of a program at a time, and its warps."""

    rows: int
    warps: int


def forward_tile(width: int) -> Tile:
    """The rule: 16 numbers of each of two rows per thread."""
    return Tile(2, min(16, block(width) // 512 or 1))


def backward_tile(width: int) -> Tile:
    """The rule: 8 numbers of each of two rows per thread; three sums of as many beside them."""
    return Tile(2, min(16, block(width) // 256 or 1))


def stages_for(tile: Tile, width: int, row_bytes: int, device: Device) -> int:
    """Loop stages of a kernel that loads ``row_bytes`` for each number of a row: 3, if the two that
    are loaded ahead leave shared memory for three programs on a multiprocessor, else 1."""
    ahead = 2 * tile.rows * block(width) * row_bytes
    return 3 if ahead <= device.shared // 3 else 1


def parts_for(rows: int, device: Device, programs: int = 3, least: int = 4) -> int:
    """Programs that each add up a share of the rows, ``least`` rows or more: up to ``programs`` for
    each multiprocessor."""
    return min(ceil_div(rows, least), programs * device.multiprocessors)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    save: bool = False,
    branch: Tensor | None = None,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """LayerNorm of x [..., C], or of x + branch, in ``dtype``.

    Args:
        save: keep each row's mean and 1 / deviation, [2, rows] fp32.
        branch: shaped as x.
        added: [C]; with it or ``branch``, the third result is the sum of all, in x's dtype.
    """
    x, rows = rows_of(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    stats = total = None
    if save:
        stats = torch.empty((2, rows.count), dtype=torch.float32, device=x.device)
    if added is not None or branch is not None:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    branch, added = (None if t is None else t.contiguous() for t in (branch, added))
    run = _forward_launch(rows, x.shape[-1], eps, device_of(x.device.index))
    run(x, weight.contiguous(), bias.contiguous(), out, stats, branch, added, total)
    return out, stats, total


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    *,
    need_x: bool,
    residual: Tensor | None = None,
    parts: Tensor | None = None,
) -> Tensor | None:
    """dx of :func:`forward` [..., C] in x's dtype, ``None`` if it is not needed.

    Args:
        g: gradient of the output.
        stats: mean and 1 / deviation.
        residual: contiguous, shaped as x; added to dx.
        parts: [P, at least 2 · C (3 · C with a residual)] fp32, gets P shares of the gradients of
            weight and bias and of the sum of all rows of ``residual``; see :func:`reduce`.
    """
    g, g_rows = rows_of(g)
    x, x_rows = rows_of(x)
    device = device_of(x.device.index)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    count, columns = (parts_for(x_rows.count, device), 0) if parts is None else parts.shape
    loaded = sum(t.element_size() for t in (g, x, residual) if t is not None)
    run = _backward_launch(g_rows, x_rows, x.shape[-1], loaded, count, columns, device)
    run(g, x, weight.contiguous(), stats, residual, dx, parts)
    return dx


def new_parts(x: Tensor, width: int) -> Tensor:
    """Where programs that go over the rows of x leave their shares of ``width`` sums."""
    count = parts_for(x.numel() // x.shape[-1], device_of(x.device.index))
    return torch.empty((count, width), dtype=torch.float32, device=x.device)


def reduce(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over parts [P, width], each column in the same order every time."""
    out = torch.empty(parts.shape[1], dtype=dtype, device=parts.device)
    _reduce_launch(*parts.shape, device_of(parts.device.index))(parts, out)
    return out


@functools.lru_cache(maxsize=4096)
def _forward_launch(rows: Rows, width: int, eps: float, device: Device) -> Launch:
    tile = forward_tile(width)
    return Launch(
        layer_norm_kernel,
        (ceil_div(rows.count, tile.rows),),
        device,
        rows[:3],
        (rows.row_stride, width, eps, tile.rows, block(width)),
        warps=tile.warps,
    )


@functools.lru_cache(maxsize=4096)
def _backward_launch(
    g_rows: Rows, x_rows: Rows, width: int, loaded: int, parts: int, columns: int, device: Device
) -> Launch:
    tile = backward_tile(width)
    return Launch(
        layer_norm_backward_kernel,
        (parts,),
        device,
        (*g_rows[:3], *x_rows[1:3], columns),
        (
            g_rows.row_stride,
            x_rows.row_stride,
            width,
            tile.rows,
            block(width),
            stages_for(tile, width, loaded, device),
        ),
        warps=tile.warps,
    )


@functools.lru_cache(maxsize=4096)
def _reduce_launch(parts: int, width: int, device: Device) -> Launch:
    return Launch(
        reduce_kernel,
        (ceil_div(width, 32),),
        device,
        (parts, width),
        (64, 32),
        warps=4,
    )
