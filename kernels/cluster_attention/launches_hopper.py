"""Launches of the Hopper kernels, which take the place of four Triton launches for large problems.

They are called as the launches that they stand for: :class:`HopperProject` as ``Project``,
:class:`HopperTransform` as ``Transform``, :class:`HopperProjectBackward` as ``ProjectBackward`` and
:class:`HopperExpandBackward` as ``ExpandBackward``. Sums are over blocks of 64 rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.hopper import hopper_kernels
from ..common.launcher import Box, gluon_box, new
from .block_sizes import BlockSizes, slots_of
from .launch_helpers import described, no_tensor, pointer, prepare

SHARED = 231_000  # bytes of shared memory for tiles; the rest of a program's is for barriers


def _kernels(module: str):
    kernels = hopper_kernels("cluster_attention", module)
    assert kernels is not None  # block_sizes.py asked before it chose groups
    return kernels


def _project_stages(groups: int, rank: int) -> int:
    return min(6, (SHARED - 12_000) // ((64 * groups + rank) * 128))


class HopperProject:
    """Launch out = x @ weightᵀ + bias, and the sums of x.

    Args:
        rows, tokens, width, rank: B·N, N, C and R.
        dtype: of x, the weight and the output.
        blocks: block sizes.
        bias: its dtype, [R]; ``None`` for none.

    Attributes:
        tile_rows: height of the sums' tiles.
        slots: samples that the rows of a tile can belong to.
    """

    tile_rows = 64

    def __init__(
        self,
        *,
        rows: int,
        tokens: int,
        width: int,
        rank: int,
        dtype: torch.dtype,
        blocks: BlockSizes,
        bias: torch.dtype | None,
    ):
        groups, device = blocks.groups, blocks.device
        tiles = ceil_div(rows, 64 * groups)
        slots = self.slots = slots_of(64, rows, tokens)
        self.new_out = new((rows, rank), dtype, device)
        self.new_sums = new((tiles * groups, slots, width), torch.float32, device)
        kernels = _kernels("hopper_forward")
        self.run = prepare(
            kernels.hopper_project_kernel,
            (tiles,),
            device,
            dtypes=(dtype, dtype, dtype, bias, torch.float32),
            tensors=(
                described(0, gluon_box((rows, width), (64, 64), dtype)),
                described(1, gluon_box((rank, width), (rank, 64), dtype)),
                described(2, gluon_box((rows, rank), (64, 64), dtype)),
                pointer(3, bias is not None),
                pointer(4),
            ),
            numbers=(rows, width, tokens, slots),
            constants={
                "v": kernels.ProjectVariant(
                    rank=rank,
                    groups=groups,
                    stages=_project_stages(groups, rank),
                    slots=8 if slots <= 8 else 16,
                    transposed=False,
                    bias=bias is not None,
                    sums=True,
                    mix=False,
                    mixed_sums=False,
                )
            },
            warps=4,
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return out [rows, R] and the sums of x as [tiles, slots, C] fp32."""
        out = self.new_out()
        sums = self.new_sums()
        self.run(x, weight, out, bias, sums)
        return out, sums


class HopperTransform:
    """Launch z = h @ T_b and y = z @ weightᵀ + bias.

    Args:
        batch, tokens, rank, width: B, N, R and C.
        dtype: of all tensors but the bias.
        blocks: block sizes.
        store_z: z is asked for.
        bias: its dtype, [C]; ``None`` for none.
    """

    def __init__(
        self,
        *,
        batch: int,
        tokens: int,
        rank: int,
        width: int,
        dtype: torch.dtype,
        blocks: BlockSizes,
        store_z: bool,
        bias: torch.dtype | None,
    ):
        rows, groups, device = batch * tokens, blocks.groups, blocks.device
        biases = 0 if bias is None else 1
        units = batch if blocks.aligned else ceil_div(rows, 64)
        self.dtype = dtype
        self.new_y = new((batch, tokens, width), dtype, device)
        self.new_z = new((rows, rank), dtype, device) if store_z else no_tensor
        kernels = _kernels("hopper_forward")

        def out(cols: int) -> Box:
            if blocks.aligned:
                return gluon_box((batch, tokens, cols), (1, 64, 64), dtype)
            return gluon_box((rows, cols), (64, 64), dtype)

        self.run = prepare(
            kernels.hopper_transform_kernel,
            (ceil_div(units, groups),),
            device,
            dtypes=(dtype,) * 6,
            tensors=(
                described(0, gluon_box((rows, rank), (64, 64), dtype)),
                described(1, gluon_box((batch * rank, rank), (rank, 64), dtype)),
                described(2, gluon_box((width, rank), (64, rank), dtype)),
                described(3, out(rank), store_z),
                described(4, out(width)),
                described(5, gluon_box((1, width), (16, 64), dtype), biases > 0),
            ),
            numbers=(rows, tokens, width),
            constants={
                "v": kernels.ExpandVariant(
                    rank=rank,
                    groups=groups,
                    stages=_expand_stages(groups, rank, biases),
                    mix=True,
                    store_z=store_z,
                    w_transposed=False,
                    biases=biases,
                    row_bias=False,
                    aligned=blocks.aligned,
                )
            },
            warps=4,
        )

    def __call__(
        self, h: Tensor, mixed: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Any, Any]:
        """Return y [B, N, C] and z [rows, R], or ``None``; there are no sums of z."""
        if bias is not None and bias.dtype != self.dtype:
            bias = bias.to(self.dtype)
        z = self.new_z()
        y = self.new_y()
        self.run(h, mixed, weight, z, y, bias)
        return y, z, None


def _expand_stages(groups: int, rank: int, biases: int) -> int:
    slot = rank * 128 + biases * 2048  # bytes of the ring's slots
    return min(6, (SHARED - groups * rank * 128) // slot)


class HopperProjectBackward:
    """Launch gz = g @ up and, if asked for, gh = gz @ T_bᵀ and the sums for both biases.

    Args:
        batch, tokens, width, rank: B, N, C and R.
        dtype: of all matrices.
        blocks: block sizes.
        sums: of g.
        mix: gh is asked for.
        mixed_sums: of gh.

    Attributes:
        sum_rows, mixed_sum_rows: how many rows the sums of g [rows, C] and of gh [rows, R] have.
            The last program's blocks may lie beyond the rows: they have no sums of g.
    """

    def __init__(
        self,
        *,
        batch: int,
        tokens: int,
        width: int,
        rank: int,
        dtype: torch.dtype,
        blocks: BlockSizes,
        sums: bool,
        mix: bool,
        mixed_sums: bool,
    ):
        rows, groups, device = batch * tokens, blocks.groups, blocks.device
        tiles = ceil_div(rows, 64 * groups)
        slots = slots_of(64, rows, rows)
        self.sum_rows, self.mixed_sum_rows = ceil_div(rows, 64), tiles * groups
        self.new_out = new((rows, rank), dtype, device)
        self.new_mixed = self.new_out if mix else no_tensor
        units = tiles * groups
        self.new_sums = new((units, slots, width), torch.float32, device) if sums else no_tensor
        self.new_mixed_sums = new((units, rank), torch.float32, device) if mixed_sums else no_tensor
        kernels = _kernels("hopper_backward")
        out = gluon_box((rows, rank), (64, 64), dtype)
        transforms = gluon_box(((batch if mix else 0) * rank, rank), (64, rank), dtype)
        self.run = prepare(
            kernels.hopper_project_backward_kernel,
            (tiles,),
            device,
            dtypes=(*(dtype,) * 5, torch.float32, torch.float32),
            tensors=(
                described(0, gluon_box((rows, width), (64, 64), dtype)),
                described(1, gluon_box((width, rank), (64, rank), dtype)),
                described(2, transforms, mix),
                described(3, out),
                described(4, out, mix),
                pointer(5, sums),
                pointer(6, mixed_sums),
            ),
            numbers=(rows, width, rows, slots, tokens if mix else 1),
            constants={
                "v": kernels.ProjectVariant(
                    rank=rank,
                    groups=groups,
                    stages=_project_stages(groups, rank),
                    slots=8 if slots <= 8 else 16,
                    transposed=True,
                    bias=False,
                    sums=sums,
                    mix=mix,
                    mixed_sums=mixed_sums,
                )
            },
            warps=4,
        )

    def __call__(self, g: Tensor, weight: Tensor, mixed: Tensor) -> tuple[Tensor, Any, Any, Any]:
        """Return gz and gh [rows, R], the sums of g and of gh; ``None`` for what is not asked for.

        Args:
            g: [B, N, C].
            weight: the up projection's [C, R].
            mixed: T_b [B, R, R].
        """
        gz = self.new_out()
        gh = self.new_mixed()
        sums = self.new_sums()
        mixed_sums = self.new_mixed_sums()
        self.run(g, weight, mixed, gz, gh, sums, mixed_sums)
        return gz, gh, sums, mixed_sums


class HopperExpandBackward:
    """Launch dx = gh @ down + dq / N.

    Args:
        batch, tokens, rank, width: B, N, R and C.
        dtype: of all tensors.
        blocks: block sizes.
    """

    def __init__(
        self,
        *,
        batch: int,
        tokens: int,
        rank: int,
        width: int,
        dtype: torch.dtype,
        blocks: BlockSizes,
    ):
        rows, groups, device = batch * tokens, blocks.groups, blocks.device
        self.new_dx = new((batch, tokens, width), dtype, device)
        kernels = _kernels("hopper_backward")
        self.run = prepare(
            kernels.hopper_expand_backward_kernel,
            (ceil_div(ceil_div(rows, 64), groups),),
            device,
            dtypes=(dtype,) * 4,
            tensors=(
                described(0, gluon_box((rows, rank), (64, 64), dtype)),
                described(1, gluon_box((rank, width), (rank, 64), dtype)),
                described(2, gluon_box((rows, width), (64, 64), dtype)),
                described(3, gluon_box((batch, width), (16, 64), dtype)),
            ),
            numbers=(rows, tokens, width),
            constants={
                "v": kernels.ExpandVariant(
                    rank=rank,
                    groups=groups,
                    stages=_expand_stages(groups, rank, groups),
                    mix=False,
                    store_z=False,
                    w_transposed=True,
                    biases=groups,
                    row_bias=True,
                    aligned=False,
                )
            },
            warps=4,
        )

    def __call__(self, gh: Tensor, weight: Tensor, dq: Tensor) -> Tensor:
        """Return dx [B, N, C].

        Args:
            gh: [rows, R].
            weight: the down projection's [R, C].
            dq: gradient of the mean token divided by N, [B, C].
        """
        dx = self.new_dx()
        self.run(gh, weight, dx, dq)
        return dx
