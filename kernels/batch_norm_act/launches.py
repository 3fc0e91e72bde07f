"""Launch the kernels of batch norm."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.direct_launch import launch
from . import triton_kernels as kernels

PROGRAMS = 528  # of the sums: four on each multiprocessor
MOST_PARTS = 1024  # of a channel: one program adds them
ROWS, COLUMNS = 32, 64  # of a program
FINISH_PARTS, FINISH_CHANNELS = 256, 8


class _View(NamedTuple):
    """How x is seen: rows of ``columns`` values, ``repeats`` pixels in each."""

    rows: int
    columns: int
    repeats: int
    channels: int

    @property
    def tiles(self) -> tuple[int, int]:
        return ceil_div(self.rows, ROWS), ceil_div(self.columns, COLUMNS)

    @property
    def parts(self) -> tuple[int, int]:
        down, across = self.tiles
        return max(1, min(down, PROGRAMS // across, MOST_PARTS // self.repeats)), across


def _view(x: Tensor) -> _View:
    channels = x.shape[1]
    pixels = x.numel() // channels
    repeats = COLUMNS // math.gcd(channels, COLUMNS)
    if pixels % repeats or channels >= 8 * COLUMNS:
        repeats = 1
    return _View(pixels // repeats, channels * repeats, repeats, channels)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    momentum: float,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return y, and what the backward needs of each channel, [4, C] fp32.

    Args:
        x: [B, C, H, W] with the channels last.
        weight, bias: [C].
        running: mean and variance, [C] fp32; updated.
        momentum, eps, activation: see the reference.
    """
    view = _view(x)
    sums = torch.empty((view.parts[0], 2, view.columns), dtype=torch.float32, device=x.device)
    launch(
        kernels.statistics_kernel,
        view.parts,
        x,
        sums,
        view.rows,
        view.columns,
        view.channels,
        BR=ROWS,
        BC=COLUMNS,
        num_warps=4,
    )
    channels = torch.empty((4, view.channels), dtype=torch.float32, device=x.device)
    mean, var = running or (x, x)
    launch(
        kernels.finish_statistics_kernel,
        (ceil_div(view.channels, FINISH_CHANNELS),),
        x,
        sums,
        weight,
        bias,
        mean,
        var,
        channels,
        view.parts[0],
        view.repeats,
        view.channels,
        x.numel() // view.channels,
        momentum,
        eps,
        RUNNING=running is not None,
        BP=FINISH_PARTS,
        BC=FINISH_CHANNELS,
        num_warps=4,
    )
    y = torch.empty_like(x)
    launch(
        kernels.normalize_kernel,
        view.tiles,
        x,
        channels,
        y,
        view.rows,
        view.columns,
        view.channels,
        ACT=activation,
        BR=ROWS,
        BC=COLUMNS,
        num_warps=4,
    )
    return y, channels


def backward(
    g: Tensor, x: Tensor, channels: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    view = _view(x)
    parts = torch.empty((view.parts[0], 2, view.columns), dtype=torch.float32, device=x.device)
    launch(
        kernels.gradient_sums_kernel,
        view.parts,
        g,
        x,
        channels,
        parts,
        view.rows,
        view.columns,
        view.channels,
        ACT=activation,
        BR=ROWS,
        BC=COLUMNS,
        num_warps=4,
    )
    dw, db = torch.empty_like(weight), torch.empty_like(bias)
    sums = torch.empty((2, view.channels), dtype=torch.float32, device=x.device)
    launch(
        kernels.finish_gradient_sums_kernel,
        (ceil_div(view.channels, FINISH_CHANNELS),),
        parts,
        channels,
        dw,
        db,
        sums,
        view.parts[0],
        view.repeats,
        view.channels,
        float(x.numel() // view.channels),
        BP=FINISH_PARTS,
        BC=FINISH_CHANNELS,
        num_warps=4,
    )
    dx = torch.empty_like(x)
    launch(
        kernels.input_gradient_kernel,
        view.tiles,
        g,
        x,
        channels,
        sums,
        dx,
        view.rows,
        view.columns,
        view.channels,
        ACT=activation,
        BR=ROWS,
        BC=COLUMNS,
        num_warps=4,
    )
    return dx, dw, db
