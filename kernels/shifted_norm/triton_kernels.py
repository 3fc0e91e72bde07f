"""Triton kernel of the norm of shifted rows. Imported on first use only."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..layer_norm.triton_kernels import normalize_rows, row_offsets


@triton.jit
def shifted_norm_kernel(
    x_ptr,  # [rows, WIDTH]
    shift_ptr,  # [WIDTH] or None
    weight_ptr,  # [WIDTH] or None
    bias_ptr,  # [WIDTH] or None
    out_ptr,  # [rows, WIDTH]
    rows,
    inner,
    outer_stride,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """Normalize rows of x + shift: equation (1) of :mod:`.op`."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    m_c = o_c < WIDTH
    mask = (o_r < rows)[:, None] & m_c[None, :]
    p_x = x_ptr + row_offsets(o_r, inner, outer_stride, STRIDE)[:, None] + o_c[None, :]
    x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        x += tl.load(shift_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    y, _, _ = normalize_rows(x, mask, WIDTH, EPS)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        y = y * weight[None, :] + bias[None, :]
    if FACTOR != 1:
        y *= FACTOR
    p_out = out_ptr + o_r.to(tl.int64)[:, None] * WIDTH + o_c[None, :]
    tl.store(p_out, y.to(out_ptr.dtype.element_ty), mask=mask)
