"""The rules for tiles and warps of GELU's kernels."""

from __future__ import annotations

from typing import NamedTuple

from ..common.launcher import block


class GeluTile(NamedTuple):
    """Rows and columns that a program handles at a time, and its warps."""

    rows: int
    cols: int
    warps: int


def gelu_tile(width: int) -> GeluTile:
    """Give each thread 16 numbers, in rows as long as can be."""
    cols = min(1024, block(width, 32))
    return GeluTile(2048 // cols, cols, 4)


def gelu_backward_tile(width: int) -> GeluTile:
    """Give each thread 8 numbers of each tensor, in rows as long as can be."""
    cols = min(1024, block(width, 32))
    return GeluTile(2048 // cols, cols, 8)
