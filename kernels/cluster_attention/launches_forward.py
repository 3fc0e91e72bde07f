"""Launches of the forward's Triton kernels, each prepared for a size: shapes, blocks, outputs.

They take sizes, dtypes and block sizes once, and then tensors, contiguous and aligned to 16 bytes.
``rows`` are all tokens of all samples. Widths and ranks are multiples of 8 where a kernel copies in
bulk (see :mod:`fastadapt.kernels.cluster_attention.padding`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Box, block, new
from . import triton_forward as kernels
from .block_sizes import BlockSizes, slots_of
from .launch_helpers import described, no_tensor, pointer, prepare, row_blocks, whole_rows


class Project:
    """Launch out = x @ weightᵀ + bias, and sums of x if asked for.

    Args:
        rows: of x.
        tokens: rows of a sample in the sums of x.
        width, rank: C and R.
        dtype: of x, the weight and the output.
        blocks: block sizes.
        transposed: the weight is [C, R], else [R, C].
        bias: its dtype, [R]; ``None`` for none.
        sums: of x over each tile, by sample.

    Attributes:
        tile_rows: height of the sums' tiles.
        slots: samples that the rows of a tile can belong to.
        sum_rows: how many tiles hold any rows.
    """

    def __init__(
        self,
        *,
        rows: int,
        tokens: int,
        width: int,
        rank: int,
        dtype: torch.dtype,
        blocks: BlockSizes,
        transposed: bool = False,
        bias: torch.dtype | None = None,
        sums: bool = False,
    ):
        tile = blocks.project
        tiles = ceil_div(rows, tile.all_rows)
        slots = slots_of(tile.all_rows, rows, tokens)
        self.tile_rows, self.slots, self.sum_rows = tile.all_rows, slots, tiles
        self.new_out = new((rows, rank), dtype, blocks.device)
        shape = (tiles, slots, width)
        self.new_sums = new(shape, torch.float32, blocks.device) if sums else no_tensor
        weight = (
            Box((width, rank), (tile.depth, tile.cols))
            if transposed
            else Box((rank, width), (tile.cols, tile.depth))
        )
        self.run = prepare(
            kernels.project_kernel,
            (tiles, ceil_div(rank, tile.cols)),
            blocks.device,
            dtypes=(dtype, dtype, dtype, bias, torch.float32),
            tensors=(
                *row_blocks(0, tile, (rows, width), tile.depth),
                described(1, weight),
                *row_blocks(2, tile, (rows, rank), tile.cols),
                pointer(3, bias is not None),
                pointer(4, sums),
            ),
            numbers=(rows, width, rank, tokens, slots),
            constants={
                "BM0": tile.rows,
                "BM1": tile.extra_rows,
                "BN": tile.cols,
                "BK": tile.depth,
                "BS": block(slots),
                "TRANSPOSED": transposed,
                "BIAS": bias is not None,
                "SUMS": sums,
            },
            warps=tile.warps,
            stages=tile.stages,
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
        """Return out [rows, R] and the sums of x as [tiles, slots, C] fp32, or ``None``."""
        out = self.new_out()
        sums = self.new_sums()
        self.run(x, weight, out, bias, sums)
        return out, sums


class Attend:
    """Launch the attention over centers, from token sums to the packed state, fp32.

    Args:
        batch, tokens, width, num_centers: B, N, C and K.
        dtype: of the centers.
        tile_rows, slots: of the sums [tiles, slots, C].
        blocks: block sizes.
    """

    def __init__(
        self,
        *,
        batch: int,
        tokens: int,
        width: int,
        num_centers: int,
        dtype: torch.dtype,
        tile_rows: int,
        slots: int,
        blocks: BlockSizes,
    ):
        size = batch * (2 * num_centers + width + 1) + num_centers
        self.new_state = new((size,), torch.float32, blocks.device)
        block_k = block(num_centers)
        # More samples than multiprocessors: leave space for several programs on each.
        crowded = batch > blocks.device.multiprocessors
        block_c = min(block(width), (16384 if crowded else 32768) // block_k)
        self.run = prepare(
            kernels.attend_kernel,
            (batch,),
            blocks.device,
            dtypes=(torch.float32, dtype, torch.float32),
            tensors=tuple(map(pointer, range(3))),
            numbers=(batch, tokens, width, tile_rows, slots),
            constants={
                "num_centers": num_centers,
                "BC": block_c,
                "BK": block_k,
                "BT": min(8, block((tokens - 2) // tile_rows + 2, 1)),
                "ONE_BLOCK": block_c >= width,
            },
            warps=4 if crowded else 8,
        )

    def __call__(self, sums: Tensor, centers: Tensor) -> Tensor:
        """Return the state: a [B, K], s [B, K], q [B, C], |q| [B] and |centers| [K]."""
        state = self.new_state()
        self.run(sums, centers, state)
        return state


class Mix:
    """Launch the mixing of the transforms by a [B, K], with which the state begins.

    Args:
        batch, num_centers, rank: B, K and R (N in token mode).
        dtype: of the mixed transforms.
        transforms_dtype: of the transforms.
        blocks: block sizes.
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
    ):
        size = rank * rank
        self.new_mixed = new((batch, rank, rank), dtype, blocks.device)
        # With few samples and many centers, Triton 3.6 gave NaN from a tile of 16 (fp16, 128
        # centers).
        bb = min(64, block(batch)) if num_centers <= 32 else 64
        bs = 64
        if dtype != torch.float32:
            bs = 512 if bb == 16 else 256
        self.run = prepare(
            kernels.mix_kernel,
            (ceil_div(size, bs), ceil_div(batch, bb)),
            blocks.device,
            dtypes=(torch.float32, transforms_dtype, dtype),
            tensors=(*map(pointer, range(3)), whole_rows(2, (batch, size), (bb, bs), dtype)),
            numbers=(batch, num_centers, size),
            constants={"BB": bb, "BK": block(num_centers), "BS": bs},
            warps=4,
        )

    def __call__(self, state: Tensor, transforms: Tensor) -> Tensor:
        """Return T_b [B, R, R]."""
        mixed = self.new_mixed()
        self.run(state, transforms, mixed)
        return mixed


class Transform:
    """Launch z = h @ T_b (or T_bᵀ), then y = z @ weightᵀ (or weight) + bias, each if asked for.

    Args:
        batch, tokens, rank: B, N and R.
        width: C, 0 for no y.
        dtype: of all matrices.
        blocks: block sizes.
        mix: else z = h.
        t_transposed: z = h @ T_bᵀ.
        store_z: z is asked for.
        w_transposed: the weight is [R, C], else [C, R].
        bias: its dtype, [C], or with ``row_bias`` one row for each sample, [B, C]; ``None`` for
            none.
        row_bias: every sample has a bias of its own.
        sums: also the column sums of z over each row tile.
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
        mix: bool = True,
        t_transposed: bool = False,
        store_z: bool = False,
        w_transposed: bool = False,
        bias: torch.dtype | None = None,
        row_bias: bool = False,
        sums: bool = False,
    ):
        rows, device = batch * tokens, blocks.device
        tile = blocks.transform if mix else blocks.expand
        block_rank = block(rank)
        tiles = ceil_div(rows, tile.all_rows)
        cols, parts = 0, 1
        if width:
            # Few row tiles: several programs share the columns of one.
            parts = max(1, min(ceil_div(width, tile.cols), device.multiprocessors // tiles))
            cols = tile.cols * ceil_div(width, tile.cols * parts)
            parts = ceil_div(width, cols)
        depth = min(tile.depth, block_rank)
        self.new_y = new((batch, tokens, width), dtype, device) if width else no_tensor
        self.new_z = new((rows, rank), dtype, device) if store_z else no_tensor
        self.new_sums = new((tiles, rank), torch.float32, device) if sums else no_tensor
        h = (
            row_blocks(0, tile, (batch, tokens, rank), depth)
            if mix
            else row_blocks(0, tile, (rows, rank), block_rank)
        )
        transform_box = (1, block_rank, depth) if t_transposed else (1, depth, block_rank)
        weight = (
            Box((rank, width), (block_rank, tile.cols))
            if w_transposed
            else Box((width, rank), (tile.cols, block_rank))
        )
        self.run = prepare(
            kernels.transform_kernel,
            (tiles, parts),
            device,
            dtypes=(*(dtype,) * 5, bias, torch.float32),
            tensors=(
                *h,
                described(1, Box((batch, rank, rank), transform_box), mix),
                described(2, weight, width > 0),
                *row_blocks(3, tile, (rows, rank), block_rank, store_z),
                *row_blocks(4, tile, (rows, width), tile.cols, width > 0),
                pointer(5, bias is not None),
                pointer(6, sums),
            ),
            numbers=(rows, tokens, rank, width, cols),
            constants={
                "BM0": tile.rows,
                "BM1": tile.extra_rows,
                "BR": block_rank,
                "BK": depth,
                "BC": tile.cols,
                "BS": block(slots_of(tile.all_rows, rows, tokens)),
                "MIX": mix,
                "T_TRANSPOSED": t_transposed,
                "STORE_Z": store_z,
                "UP": width > 0,
                "W_TRANSPOSED": w_transposed,
                "BIAS": bias is not None and not row_bias,
                "ROW_BIAS": row_bias,
                "SUMS": sums,
                "PREFETCH": width > 0 and cols == tile.cols,
            },
            warps=tile.warps,
            stages=tile.stages,
        )

    def __call__(
        self,
        h: Tensor,
        mixed: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return y [B, N, C], z [rows, R] and the sums of z [tiles, R] fp32, or ``None`` each.

        Args:
            h: [rows, R].
            mixed: T_b [B, R, R].
            weight, bias: of the up projection.
        """
        z = self.new_z()
        y = self.new_y()
        sums = self.new_sums()
        self.run(h, mixed, weight, z, y, bias, sums)
        return y, z, sums
