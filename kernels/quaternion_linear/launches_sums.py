"""Launches of column sums, and of the sum over split-K partials."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Device, Launch, block
from .form import GroupLayout
from .triton_sums import column_sums_kernel, sum_partials_pair_kernel

Step = Callable[[], None]  # a launch with its tensors, still to be run


class Reduction(NamedTuple):
    """Partials [splits, count] fp32 and the result [count] that they add up to."""

    partials: Tensor
    out: Tensor


class _Size(NamedTuple):
    numel: int
    splits: int
    dtype: torch.dtype | None


def sequence(*steps: Step) -> Step:
    """Combine steps into one that runs them in order."""

    def run() -> None:
        for step in steps:
            step()

    return run


def sum_partials(device: Device, first: Reduction, second: Reduction | None = None) -> Step:
    """Prepare the sum over partials, of one or two results in one launch."""
    sizes = [
        _Size(0, 1, None)
        if reduction is None
        else _Size(reduction.out.numel(), reduction.partials.shape[0], reduction.out.dtype)
        for reduction in (first, second)
    ]
    launch = _sum_partials_launch(*sizes, device)
    return functools.partial(launch, *first, *((None, None) if second is None else second))


@functools.lru_cache(maxsize=4096)
def _sum_partials_launch(first: _Size, second: _Size, device: Device) -> Launch:
    # Each thread loads 16 numbers of the partials at once.
    at_once = [
        128 if s.splits > 64 else min(16, block(max(s.splits, 1), 1)) for s in (first, second)
    ]
    cols = [2048 // n for n in at_once]
    return Launch(
        sum_partials_pair_kernel,
        (ceil_div(first.numel, cols[0]) + ceil_div(second.numel, cols[1]),),
        device,
        (first.numel, second.numel, first.splits, second.splits),
        (at_once[0], cols[0], at_once[1], cols[1]),
        warps=4,
        dtypes=(torch.float32, first.dtype, second.dtype and torch.float32, second.dtype),
    )


@functools.lru_cache(maxsize=4096)
def column_sums_launch(
    layout: GroupLayout, width: int, dtype: torch.dtype, device: Device
) -> tuple[Launch, int]:
    """Prepare the column sums of g [M, width], and count the splits of its rows."""
    splits = min(64, ceil_div(layout.rows, 128))
    launch = Launch(
        column_sums_kernel,
        (ceil_div(width, 64), splits),
        device,
        (
            layout.rows,
            width,
            layout.row_stride,
            layout.col_stride,
            ceil_div(layout.rows, splits),
        ),
        (64, 64),
        warps=4,
        dtypes=(dtype, torch.float32),
    )
    return launch, splits
