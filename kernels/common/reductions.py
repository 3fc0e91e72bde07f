"""What the Triton kernels of more than one operation compute alike."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kahan_add(acc, lost, value):
    """acc + value and what rounding takes from it, ``lost``: for sums over many rows or samples."""
    value -= lost
    total = acc + value
    return total, (total - acc) - value


@triton.jit
def sum_parts(parts_ptr, out_ptr, parts, width, o_c, BP: tl.constexpr, BC: tl.constexpr):
    """out [width], the sum over parts [parts, width] fp32, at the BC columns o_c.

    BP parts are loaded at once: one after the other, each would wait for the memory.
    """
    m_c = o_c < width
    acc = tl.zeros((BP, BC), tl.float32)
    for part in range(0, parts, BP):
        o_p = part + tl.arange(0, BP)
        p = parts_ptr + o_p.to(tl.int64)[:, None] * width + o_c[None, :]
        acc += tl.load(p, mask=(o_p < parts)[:, None] & m_c[None, :], other=0.0)
    tl.store(out_ptr + o_c, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=m_c)
