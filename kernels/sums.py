"""What the Triton kernels of more than one operation compute alike."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 (the interpreter asks for it)


@triton.jit
def kahan_add(acc, lost, value):
    """acc + value and what rounding takes from it, ``lost``: for sums over many rows or samples."""
    value -= lost
    total = acc + value
    return total, (total - acc) - value
