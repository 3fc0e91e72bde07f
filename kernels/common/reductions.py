"""Sums that the Triton kernels of more than one operation share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kahan_add(acc, lost, value):
    """Add with Kahan's compensation, for sums over many rows or samples.

    Returns:
        ``acc + value``, and what rounding took from it, to be passed on as ``lost``.
    """
    value -= lost
    total = acc + value
    return total, (total - acc) - value


@triton.jit
def sum_parts(parts_ptr, out_ptr, parts, width, o_c, BP: tl.constexpr, BC: tl.constexpr):
    """Sum partials [parts, width] fp32 to out [width], at the BC columns o_c.

    BP partials are loaded at once: one after the other, each would wait for the memory.
    """
    m_c = o_c < width
    acc = tl.zeros((BP, BC), tl.float32)
    for part in range(0, parts, BP):
        o_p = part + tl.arange(0, BP)
        p = parts_ptr + o_p.to(tl.int64)[:, None] * width + o_c[None, :]
        acc += tl.load(p, mask=(o_p < parts)[:, None] & m_c[None, :], other=0.0)
    tl.store(out_ptr + o_c, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=m_c)
