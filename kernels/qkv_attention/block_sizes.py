"""The rules for tiles and warps of attention's launch, and the variants that are worth timing."""

from __future__ import annotations

from typing import NamedTuple

from ..common import tuning
from ..common.launcher import Device, block

OPERATION = "qkv_attention"


class AttentionTile(NamedTuple):
    """What a program computes at a time.

    Attributes:
        queries: rows of q; 64 for each four warps become one instruction on Hopper.
        keys: of a whole tile.
        rest: of the last tile, which holds the keys that fill no whole one; 0 if none are left.
        warps: of a program.
        stages: of the loop over tiles, where there are too many to be unrolled.
    """

    queries: int
    keys: int
    rest: int
    warps: int
    stages: int = 2


def tile_of(tokens: int, queries: int, keys: int, warps: int, stages: int = 2) -> AttentionTile:
    """Complete a tile: the rest is the power of two that holds the keys left over."""
    left = tokens % keys
    rest = block(left) if left else 0
    if tokens < keys:
        keys = rest
    return AttentionTile(queries, keys, rest, warps, stages)


def tile_for(tokens: int, head_dim: int, element: int, device: Device) -> AttentionTile:
    """Choose the tile, of 128 keys: 197 tokens as two of them take 228 µs on an H100 (batch 256).

    As three tiles of 64 keys and one of 16 they take 240, though fewer of the keys are padding.

    Args:
        tokens: N.
        head_dim: D.
        element: bytes of a number.
        device: where it runs.
    """
    choice = {}
    if device.index is not None:
        choice = tuning.chosen(OPERATION, device.index, (tokens, head_dim))
    if choice:
        return tile_of(tokens, choice["queries"], choice["keys"], choice["warps"])
    if element == 4:
        return tile_of(tokens, 32, 32, 4)
    queries = 64 if tokens > 32 else 32
    return tile_of(tokens, queries, 128 if tokens > 64 and head_dim <= 64 else 64, 4)


# Queries, keys and warps: tiles of 128 keys pad 197 to 256, but multiply in larger instructions.
VARIANTS = (
    {"queries": 64, "keys": 64, "warps": 4},
    {"queries": 64, "keys": 128, "warps": 4},
    {"queries": 64, "keys": 256, "warps": 4},
    {"queries": 128, "keys": 64, "warps": 4},
    {"queries": 128, "keys": 64, "warps": 8},
    {"queries": 128, "keys": 128, "warps": 8},
    {"queries": 128, "keys": 256, "warps": 8},
    {"queries": 32, "keys": 64, "warps": 4},
)
