"""Integer arithmetic of launch grids and tiles, on the host."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """Divide and round up: how many blocks of ``b`` hold ``a``."""
    return -(-a // b)
