"""Launches of the backward's Triton kernels, each prepared for a size, as those of the forward are.

The projection and the two products of the transform run the forward's kernels in other variants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Box, block, new
from . import triton_backward as kernels
from .block_sizes import BlockSizes
from .launch_helpers import described, no_tensor, pointer, prepare, whole_rows
from .launches_forward import Project, Transform


class ProjectBackward:
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
        rows = batch * tokens
        self.project = Project(
            rows=rows,
            tokens=rows,  # the sums are over all samples
            width=width,
            rank=rank,
            dtype=dtype,
            blocks=blocks,
            transposed=True,
            sums=sums,
        )
        self.sum_rows = self.project.sum_rows
        self.mixed_sum_rows = ceil_div(rows, blocks.transform.all_rows)
        self.transform = None
        if mix:
            self.transform = Transform(
                batch=batch,
                tokens=tokens,
                rank=rank,
                width=0,
                dtype=dtype,
                blocks=blocks,
                t_transposed=True,
                store_z=True,
                sums=mixed_sums,
            )

    def __call__(self, g: Tensor, weight: Tensor, mixed: Tensor) -> tuple[Tensor, Any, Any, Any]:
        """Return gz and gh [rows, R], the sums of g and of gh; ``None`` for what is not asked for.

        Args:
            g: [B, N, C].
            weight: the up projection's [C, R].
            mixed: T_b [B, R, R].
        """
        gz, sums = self.project(g, weight, None)
        if self.transform is None:
            return gz, None, sums, None
        _, gh, mixed_sums = self.transform(gz, mixed)
        return gz, gh, sums, mixed_sums


class ExpandBackward:
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
        self.transform = Transform(
            batch=batch,
            tokens=tokens,
            rank=rank,
            width=width,
            dtype=dtype,
            blocks=blocks,
            mix=False,
            w_transposed=True,
            bias=dtype,
            row_bias=True,
        )

    def __call__(self, gh: Tensor, weight: Tensor, dq: Tensor) -> Any:
        """Return dx [B, N, C].

        Args:
            gh: [rows, R].
            weight: the down projection's [R, C].
            dq: gradient of the mean token divided by N, [B, C].
        """
        return self.transform(gh, None, weight, dq)[0]


class Outer:
    """Launch hᵀ @ gz for each sample.

    Args:
        batch, tokens, rank: B, N and R.
        dtype: of all tensors.
        blocks: block sizes.
    """

    def __init__(
        self, *, batch: int, tokens: int, rank: int, dtype: torch.dtype, blocks: BlockSizes
    ):
        tile = blocks.outer
        depth = min(tile.depth, block(tokens))
        tiles_j = ceil_div(rank, tile.cols)
        self.new_out = new((batch, rank, rank), dtype, blocks.device)
        self.run = prepare(
            kernels.outer_kernel,
            (ceil_div(rank, tile.rows) * tiles_j, batch),
            blocks.device,
            dtypes=(dtype,) * 3,
            tensors=(
                described(0, Box((batch, tokens, rank), (1, depth, tile.rows))),
                described(1, Box((batch, tokens, rank), (1, depth, tile.cols))),
                described(2, Box((batch, rank, rank), (1, tile.rows, tile.cols))),
            ),
            numbers=(tokens, tiles_j),
            constants={"BI": tile.rows, "BJ": tile.cols, "BK": depth},
            warps=tile.warps,
            stages=tile.stages,
        )

    def __call__(self, h: Tensor, gz: Tensor) -> Tensor:
        """Return G_b [B, R, R] in their dtype."""
        out = self.new_out()
        self.run(h, gz, out)
        return out


class Unmix:
    """Launch the gradients of the mixing.

    Args:
        batch, num_centers, rank: B, K and R (N in token mode).
        dtype: of the mixed transforms' gradient.
        transforms_dtype: of the transforms.
        blocks: block sizes.
        need_t: the transforms' gradient is asked for.
        need_a: the gradient of a is asked for.

    Attributes:
        programs: parts that da comes in.
    """

    def __init__(
        self,
        *,
        batch: int,
        num_centers: int,
        rank: int,
        dtype: torch.dtype,
        transforms_dtype: torch.dtype,
        blocks: BlockSizes,
        need_t: bool,
        need_a: bool,
    ):
        size, device = rank * rank, blocks.device
        bs = blocks.unmix_cols if dtype != torch.float32 else 64
        # The partial sums of da stay under 64 MB; more samples or centers get fewer programs.
        self.programs = min(ceil_div(size, bs), max(16, (1 << 24) // (batch * num_centers)))
        rows = blocks.unmix_rows if dtype != torch.float32 else 32
        bb = min(rows, block(batch)) if num_centers <= 32 else rows
        shape = (num_centers, rank, rank)
        self.new_transforms = new(shape, transforms_dtype, device) if need_t else no_tensor
        shape = (self.programs, batch, num_centers)
        self.new_da = new(shape, torch.float32, device) if need_a else no_tensor
        self.run = prepare(
            kernels.unmix_kernel,
            (self.programs,),
            device,
            dtypes=(dtype, torch.float32, transforms_dtype, transforms_dtype, torch.float32),
            tensors=(
                pointer(0),
                whole_rows(0, (batch, size), (bb, bs), dtype),
                pointer(1),
                pointer(2),
                pointer(3, need_t),
                pointer(4, need_a),
            ),
            numbers=(batch, num_centers, size),
            constants={
                "BB": bb,
                "BK": block(num_centers),
                "BS": bs,
                "NEED_T": need_t,
                "NEED_A": need_a,
            },
            warps=4,
        )

    def __call__(self, d_mixed: Tensor, state: Tensor, transforms: Tensor) -> tuple[Any, Any]:
        """Return dtransforms [K, R, R] and da as [programs, B, K] fp32 partial sums."""
        d_transforms = self.new_transforms()
        da = self.new_da()
        self.run(d_mixed, state, transforms, d_transforms, da)
        return d_transforms, da


class Unattend:
    """Launch the gradients of the attention over centers.

    Args:
        programs: parts that da [programs, B, K] comes in.
        batch, tokens, width, num_centers: B, N, C and K.
        dtype: of dq.
        centers_dtype: of the centers.
        blocks: block sizes.
        need_x: dq is asked for.
    """

    def __init__(
        self,
        *,
        programs: int,
        batch: int,
        tokens: int,
        width: int,
        num_centers: int,
        dtype: torch.dtype,
        centers_dtype: torch.dtype,
        blocks: BlockSizes,
        need_x: bool,
    ):
        block_k = block(num_centers)
        block_c = max(16, min(block(width), 32768 // block_k))
        self.new_ds = new((batch, num_centers), torch.float32, blocks.device)
        self.new_dq = new((batch, width), dtype, blocks.device) if need_x else no_tensor
        self.run = prepare(
            kernels.unattend_kernel,
            (batch,),
            blocks.device,
            dtypes=(torch.float32, torch.float32, centers_dtype, torch.float32, dtype),
            tensors=(*map(pointer, range(4)), pointer(4, need_x)),
            numbers=(programs, batch, tokens, width),
            constants={
                "num_centers": num_centers,
                "BP": min(block(programs), 8192 // block_k),
                "BC": block_c,
                "BK": block_k,
                "NEED_X": need_x,
                "ONE_BLOCK": block_c >= width,
            },
            warps=8,
        )

    def __call__(self, da: Tensor, state: Tensor, centers: Tensor) -> tuple[Tensor, Any]:
        """Return ds [B, K] fp32, and dq / N [B, C] or ``None``."""
        ds = self.new_ds()
        dq = self.new_dq()
        self.run(da, state, centers, ds, dq)
        return ds, dq


class ParameterSums:
    """Launch the last sums, over samples and tiles: gradients of the centers and of both biases.

    Args:
        batch, width, num_centers, rank: B, C, K and R.
        centers_dtype: of the centers.
        d_centers, d_up_bias, d_down_bias: dtypes of the gradients [C, K], [C] and [R]; ``None``
            for those that are not asked for.
        blocks: block sizes.
        up_rows, down_rows: how many rows the biases' partial sums have, [rows, C] and [rows, R].
    """

    def __init__(
        self,
        *,
        batch: int,
        width: int,
        num_centers: int,
        rank: int,
        centers_dtype: torch.dtype,
        d_centers: torch.dtype | None,
        d_up_bias: torch.dtype | None,
        d_down_bias: torch.dtype | None,
        blocks: BlockSizes,
        up_rows: int = 0,
        down_rows: int = 0,
    ):
        bc = 32
        outputs = (
            ((width, num_centers), d_centers),
            ((width,), d_up_bias),
            ((rank,), d_down_bias),
        )
        programs = [0 if dtype is None else ceil_div(shape[0], bc) for shape, dtype in outputs]
        self.new_centers, self.new_up, self.new_down = (
            no_tensor if dtype is None else new(shape, dtype, blocks.device)
            for shape, dtype in outputs
        )
        need_centers, need_up, need_down = (dtype is not None for _, dtype in outputs)
        self.run = prepare(
            kernels.parameter_sums_kernel,
            (sum(programs),),
            blocks.device,
            dtypes=(
                *(torch.float32, torch.float32, centers_dtype),
                *(d_centers, torch.float32, d_up_bias, torch.float32, d_down_bias),
            ),
            tensors=(
                pointer(0, need_centers),
                pointer(1),
                pointer(2),
                pointer(3, need_centers),
                pointer(4, need_up),
                pointer(5, need_up),
                pointer(6, need_down),
                pointer(7, need_down),
            ),
            numbers=(batch, width, rank if need_down else 0, up_rows, down_rows, *programs[:2]),
            constants={
                "num_centers": num_centers,
                "BB": max(32, min(block(batch), 4096 // block(num_centers))),
                "BC": bc,
                "BK": block(num_centers),
                "NEED_CENTERS": need_centers,
                "NEED_UP": need_up,
                "NEED_DOWN": need_down,
            },
            warps=8,
        )

    def __call__(
        self,
        *,
        ds: Tensor | None,
        state: Tensor,
        centers: Tensor,
        up_sums: Tensor | None = None,
        down_sums: Tensor | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return dcenters [C, K], dup_bias [C] and ddown_bias [R], or ``None`` each."""
        d_centers, d_up, d_down = self.new_centers(), self.new_up(), self.new_down()
        self.run(ds, state, centers, d_centers, up_sums, d_up, down_sums, d_down)
        return d_centers, d_up, d_down
