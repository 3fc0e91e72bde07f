"""The rules for block sizes of LayerNorm's kernels, by width, rows and device."""

from __future__ import annotations

from typing import NamedTuple

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, block


class RowTile(NamedTuple):
    """Rows that a program handles at a time, and its warps."""

    rows: int
    warps: int


def forward_tile(width: int) -> RowTile:
    """Give each thread 16 numbers of each of two rows."""
    return RowTile(2, min(16, block(width) // 512 or 1))


def backward_tile(width: int) -> RowTile:
    """Give each thread 8 numbers of each of two rows, beside three sums of as many."""
    return RowTile(2, min(16, block(width) // 256 or 1))


def twice_backward_tile(width: int) -> tuple[RowTile, int]:
    """Choose the tile of the backward of two norms, and programs for each multiprocessor.

    Each thread has 8 numbers of each row, beside four sums of as many: two rows at a time of up to
    1024 channels, one of more. No more programs are launched than the registers hold at once.
    """
    warps = min(16, block(width) // 256 or 1)
    return (RowTile(2, warps), 12 // warps) if warps <= 4 else (RowTile(1, warps), 16 // warps)


def stages_for(tile: RowTile, width: int, row_bytes: int, device: Device) -> int:
    """Choose the loop stages of a kernel that loads ``row_bytes`` for each number of a row.

    Three, if the two tiles that are loaded ahead leave shared memory for three programs on a
    multiprocessor, else one.
    """
    ahead = 2 * tile.rows * block(width) * row_bytes
    return 3 if ahead <= device.shared // 3 else 1


def partial_count(rows: int, device: Device, programs: int = 3, least: int = 4) -> int:
    """Count the programs that each add up a share of the rows, and so the partials.

    Args:
        programs: at most, for each multiprocessor.
        least: rows of a program.
    """
    return min(ceil_div(rows, least), programs * device.multiprocessors)


def tokens_per_program(samples: int, tokens: int, device: Device) -> int:
    """Split tokens among eight programs for each multiprocessor: four tokens each or more."""
    programs = ceil_div(8 * device.multiprocessors, samples)
    return max(4, ceil_div(tokens, programs))
