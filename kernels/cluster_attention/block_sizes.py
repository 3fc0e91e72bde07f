"""The rule for block sizes of cluster attention: which kernels, with which tiles, for which size.

Nothing is measured: the rule depends on the problem's size and on the device alone, unless the user
had it tuned (``fastadapt bench --tune``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..common import tuning
from ..common.arithmetic import ceil_div
from ..common.hopper import hopper_kernels
from ..common.launcher import Device, block, device_of


@dataclass(frozen=True)
class RowBlock:
    """Block sizes of one product over rows, and how its kernel is launched.

    A block's height is a power of two; the rows of a program come in two blocks, so that it can
    have 192.
    """

    rows: int
    extra_rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    @property
    def all_rows(self) -> int:
        """Rows of a program."""
        return self.rows + self.extra_rows


@dataclass(frozen=True, eq=False)  # compared by identity: the key of what is prepared for it
class BlockSizes:
    """Block sizes of all kernels for one problem size."""

    project: RowBlock
    transform: RowBlock
    expand: RowBlock  # the up projection alone, in the backward
    outer: RowBlock
    unmix_rows: int
    unmix_cols: int
    device: Device
    groups: int  # of the Hopper kernels; 0 for the plain ones
    aligned: bool  # the Hopper transform gives every group a sample instead of 64 rows


@functools.lru_cache(maxsize=4096)
def block_sizes(rows: int, tokens: int, width: int, rank: int, device: Device) -> BlockSizes:
    """Choose as few waves of as tall tiles as the multiprocessors and their memory allow.

    Args:
        rows: tokens of all samples, B·N.
        tokens: N.
        width: C.
        rank: R.
        device: the GPU.
    """
    multiprocessors, shared = device.multiprocessors, device.shared
    block_rank = block(rank)
    big = shared >= 200_000 and block_rank <= 256

    def waves(m: int) -> int:
        # 24 rows' worth of work is what a tile costs beside its rows (prologue, weights, epilogue).
        return ceil_div(rows, m * multiprocessors) * (m + 24)

    choices = candidates(rows, tokens, rank, device)
    # Short samples: a tall tile would hold too many of them.
    tall = min(choices["tall"], key=waves)
    # Hopper kernels: one to three groups of 64 rows, as many as make the least work when a tile
    # costs one group's worth beside its rows (weights, prologue, epilogue).
    groups = 0
    if rows > 4096 and len(choices["groups"]) > 1:
        groups = min((1, 2, 3), key=lambda g: ceil_div(rows, 64 * g * multiprocessors) * (g + 1))
    if device.index is not None:
        tuned = tuning.chosen("cluster_attention", device.index, (rows, tokens, width, rank))
        if tuned.get("tall") in choices["tall"] and tuned.get("groups") in choices["groups"]:
            tall, groups = tuned["tall"], tuned["groups"]
    if tall == 64:
        cols = block_rank if big else min(block_rank, 128)
        project = RowBlock(64, 0, cols, 64, 4, 4 if big else 3)
        transform = RowBlock(64, 0, 128 if big else 64 if shared >= 150_000 else 32, 64, 8, 2)
    else:
        project = RowBlock(128, tall - 128, block_rank, 64, 8, 3)
        transform = RowBlock(128, tall - 128, 128, 64, 8, 2)
    tiles = ceil_div(rows, project.all_rows)
    if tiles * 2 <= multiprocessors:
        project = RowBlock(64, 0, min(block_rank, 64), 64, 4, 4)
        for cols in (64, 32) if big else ():
            cols = min(block_rank, cols)
            if ceil_div(rows, 64) * ceil_div(rank, cols) <= multiprocessors:
                # Every program has a multiprocessor for itself: few steps, deep ones.
                project = RowBlock(64, 0, cols, min(block(width), 256), 4, 3)
        transform = RowBlock(64, 0, 64, 64, 4, 3 if big else 2)
    if big and tokens >= 16 and tiles * 2 > multiprocessors:
        expand = RowBlock(128, 0, 64, 64, 8, 3)
    else:  # many samples to a tile, or a large rank: their tables take shared memory, too
        expand = RowBlock(64, 0, 32, 64, transform.warps, 2)
    half = min(block_rank, 128)
    outer = RowBlock(half, 0, block_rank if big else half, 64, 8 if big else 4, 3 if big else 2)
    return BlockSizes(
        project=project,
        transform=transform,
        expand=expand,
        outer=outer,
        unmix_rows=64,
        unmix_cols=256 if big else 128,
        device=device,
        groups=groups,
        aligned=aligned(rows, tokens, groups, multiprocessors),
    )


def block_sizes_for(x: Tensor, rank: int) -> BlockSizes:
    """Choose for x [B, N, C] on its device."""
    batch, tokens, width = x.shape
    chosen = block_sizes(batch * tokens, tokens, width, rank, device_of(x.device.index))
    if _forced_groups is None:
        return chosen
    groups, small_samples = _forced_groups
    return dataclasses.replace(chosen, groups=groups, aligned=small_samples and tokens <= 64)


_forced_groups: tuple[int, bool] | None = None


@contextlib.contextmanager
def force_groups(groups: int, *, aligned: bool = False) -> Iterator[None]:
    """Have Hopper's kernels run with so many groups at any size: how they are tested.

    Args:
        groups: 0 for the plain kernels.
        aligned: give every group a sample where samples have up to 64 tokens.
    """
    global _forced_groups
    before, _forced_groups = _forced_groups, (groups, aligned)
    try:
        yield
    finally:
        _forced_groups = before


def aligned(rows: int, tokens: int, groups: int, multiprocessors: int) -> bool:
    """Return whether groups that have a sample each, of up to 64 tokens, make no more waves.

    They copy each T_b once; where 64 rows belong to several samples, each group meets all of them.
    """
    if not groups or tokens > 64:
        return False
    wave = groups * multiprocessors
    return ceil_div(rows // tokens, wave) <= ceil_div(rows, 64 * wave)


def candidates(rows: int, tokens: int, rank: int, device: Device) -> dict[str, tuple[int, ...]]:
    """Return what may be tuned: the plain kernels' row tile; Hopper's groups (0: plain kernels)."""
    big = device.shared >= 200_000 and block(rank) <= 256
    hopper = (
        device.has_warp_group_products
        and rank in (64, 128, 256)
        and tokens >= 5
        and hopper_kernels("cluster_attention", "hopper_forward") is not None
    )
    return {
        "tall": (192, 128, 64) if big and tokens >= 16 else (64,),
        "groups": (0, 1, 2, 3) if hopper else (0,),
    }


def slots_of(tile_rows: int, rows: int, tokens: int) -> int:
    """Return how many samples the rows of one tile can belong to."""
    return min((tile_rows - 2) // tokens + 2, tile_rows, rows // tokens)
