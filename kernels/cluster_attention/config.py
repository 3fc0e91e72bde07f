"""Launch configurations of cluster attention: which kernels, with which tiles, for which size."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from ..common import tuning
from ..common.arithmetic import ceil_div
from ..common.launcher import Device, block, device_of


@dataclass(frozen=True)
class Tile:
    """Launch configuration of one kernel: rows (in two parts), columns, depth; warps, stages."""

    rows: int
    extra_rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    @property
    def all_rows(self) -> int:
        return self.rows + self.extra_rows


@dataclass(frozen=True, eq=False)  # compared by identity: the key of what is prepared for it
class Config:
    """Launch configurations for one problem size."""

    project: Tile
    transform: Tile
    expand: Tile  # `transform` without T_b
    outer: Tile
    unmix_rows: int
    unmix_cols: int
    device: Device
    groups: int  # of Hopper's own kernels; 0 for the plain ones
    aligned: bool  # their transform gives every group a sample instead of 64 rows


@functools.lru_cache(maxsize=4096)
def default_config(rows: int, tokens: int, width: int, rank: int, device: Device) -> Config:
    """The rule: as few waves of as tall tiles as the multiprocessors and their memory allow."""
    multiprocessors, shared = device.multiprocessors, device.shared
    block_rank = block(rank)
    big = shared >= 200_000 and block_rank <= 256

    def waves(m: int) -> int:
        # 24 rows' worth of work is what a tile costs beside its rows (fill, weights, drain).
        return ceil_div(rows, m * multiprocessors) * (m + 24)

    choices = candidates(rows, tokens, rank, device)
    # Short samples: a tall tile would hold too many of them.
    tall = min(choices["tall"], key=waves)
    # Hopper's own kernels: one to three groups of 64 rows, as many as make the least work when a
    # tile costs one group's worth beside its rows (weights, fill, drain).
    groups = 0
    if rows > 4096 and len(choices["groups"]) > 1:
        groups = min((1, 2, 3), key=lambda g: ceil_div(rows, 64 * g * multiprocessors) * (g + 1))
    if device.index is not None:
        tuned = tuning.chosen("cluster_attention", device.index, (rows, tokens, width, rank))
        if tuned.get("tall") in choices["tall"] and tuned.get("groups") in choices["groups"]:
            tall, groups = tuned["tall"], tuned["groups"]
    if tall == 64:
        project = Tile(64, 0, block_rank if big else min(block_rank, 128), 64, 4, 4 if big else 3)
        transform = Tile(64, 0, 128 if big else 64 if shared >= 150_000 else 32, 64, 8, 2)
    else:
        project = Tile(128, tall - 128, block_rank, 64, 8, 3)
        transform = Tile(128, tall - 128, 128, 64, 8, 2)
    tiles = ceil_div(rows, project.all_rows)
    if tiles * 2 <= multiprocessors:
        project = Tile(64, 0, min(block_rank, 64), 64, 4, 4)
        for cols in (64, 32) if big else ():
            cols = min(block_rank, cols)
            if ceil_div(rows, 64) * ceil_div(rank, cols) <= multiprocessors:
                # Every program has a multiprocessor for itself: few steps, deep ones.
                project = Tile(64, 0, cols, min(block(width), 256), 4, 3)
        transform = Tile(64, 0, 64, 64, 4, 3 if big else 2)
    if big and tokens >= 16 and tiles * 2 > multiprocessors:
        expand = Tile(128, 0, 64, 64, 8, 3)
    else:  # many samples to a tile, or a large rank: their tables take shared memory, too
        expand = Tile(64, 0, 32, 64, transform.warps, 2)
    half = min(block_rank, 128)
    outer = Tile(half, 0, block_rank if big else half, 64, 8 if big else 4, 3 if big else 2)
    return Config(
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


def aligned(rows: int, tokens: int, groups: int, multiprocessors: int) -> bool:
    """Whether groups that have a sample each, of up to 64 tokens, make no more waves.

    They copy each T_b once; where 64 rows belong to several samples, each group meets all of them.
    """
    if not groups or tokens > 64:
        return False
    wave = groups * multiprocessors
    return ceil_div(rows // tokens, wave) <= ceil_div(rows, 64 * wave)


def candidates(rows: int, tokens: int, rank: int, device: Device) -> dict[str, tuple[int, ...]]:
    """What may be tuned: the plain kernels' row tile; Hopper's groups (0: the plain ones)."""
    big = device.shared >= 200_000 and block(rank) <= 256
    hopper = (
        device.major == 9
        and rank in (64, 128, 256)
        and tokens >= 5
        and hopper_kernels() is not None
    )
    return {
        "tall": (192, 128, 64) if big and tokens >= 16 else (64,),
        "groups": (0, 1, 2, 3) if hopper else (0,),
    }


def slots_of(tile_rows: int, rows: int, tokens: int) -> int:
    """How many samples the rows of one tile can belong to."""
    return min((tile_rows - 2) // tokens + 2, tile_rows, rows // tokens)


def config_for(x: Tensor, rank: int) -> Config:
    batch, tokens, width = x.shape
    return default_config(batch * tokens, tokens, width, rank, device_of(x.device.index))


@functools.lru_cache
def hopper_kernels():
    """The kernels for Hopper; ``None`` where this Triton has another Gluon than they need."""
    try:
        from . import hopper_kernels as cluster_attention_gluon
    except (ImportError, AttributeError):
        return None
    return cluster_attention_gluon
