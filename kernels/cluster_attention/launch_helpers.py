"""How the launches of cluster attention describe tensors to kernels."""

from __future__ import annotations

from typing import Any

import torch

from ..common.launcher import Box, Device, Launch
from .block_sizes import RowBlock


def no_tensor() -> Any:
    """Make an output that nobody asked for: ``None``."""
    return None


def prepare(
    kernel,
    grid: tuple[int, ...],
    device: Device,
    *,
    dtypes: tuple[torch.dtype | None, ...],
    tensors: tuple[tuple[int, Box | None] | None, ...],
    numbers: tuple[int, ...],
    constants: dict,
    warps: int,
    stages: int = 3,
) -> Launch:
    """Prepare a launch; ``constants`` are the kernel's constexpr parameters in order, by name."""
    return Launch(
        kernel,
        grid,
        device,
        numbers,
        tuple(constants.values()),
        warps=warps,
        stages=stages,
        tensors=tensors,
        dtypes=dtypes,
    )


def pointer(number: int, present: bool = True) -> tuple[int, None] | None:
    """Pass a call's tensor, by number, as a pointer, if it is there."""
    return (number, None) if present else None


def described(number: int, box: Box, present: bool = True) -> tuple[int, Box] | None:
    """Pass a call's tensor, by number, as a descriptor, if it is there."""
    return (number, box) if present else None


def row_blocks(
    number: int, blocks: RowBlock, shape: tuple[int, ...], cols: int, present: bool = True
) -> tuple[tuple[int, Box] | None, ...]:
    """Pass a matrix, or one for each sample, twice: in blocks of both of a program's heights."""
    ones = (1,) * (len(shape) - 2)
    extra = present and blocks.extra_rows > 0
    return (
        described(number, Box(shape, (*ones, blocks.rows, cols)), present),
        described(number, Box(shape, (*ones, blocks.extra_rows, cols)), extra),
    )


def whole_rows(
    number: int, shape: tuple[int, int], box: tuple[int, int], dtype: torch.dtype
) -> tuple[int, Box] | None:
    """Pass a descriptor where the bulk copies can take the rows: of whole 16 bytes."""
    return described(number, Box(shape, box), shape[1] * dtype.itemsize % 16 == 0)
