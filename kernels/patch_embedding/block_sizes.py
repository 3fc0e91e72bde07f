"""The rules for tiles and warps of the product with patches, and variants that are worth timing."""

from __future__ import annotations

from typing import NamedTuple

from ..common import tuning
from ..common.arithmetic import ceil_div
from ..common.launcher import Device, block

OPERATION = "patch_embedding"


class PatchTile(NamedTuple):
    """Launch configuration of the product: its tile, warps and stages."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def tile_for(
    rows: int, depth: int, width: int, element: int, first: bool, norm: bool, device: Device
) -> PatchTile:
    """Choose the tile, of all columns where there is a norm.

    The first products' tiles are the fastest of ViT-B/16's and ConvNeXt-B's at 8, 64 and 256 images
    on an H100.

    Args:
        rows: B · N.
        depth: P·P·D.
        width: C.
        element: bytes of a number of the weight.
        first: whether the images are bytes, at the start of a network.
        norm: whether the rows are normalised.
        device: where it runs.
    """
    choice = {}
    if device.index is not None:
        choice = tuning.chosen(OPERATION, device.index, (rows, depth, width))
    if choice:
        return PatchTile(**choice)
    if element == 4:
        return PatchTile(16, block(width) if norm else 32, 32, 4, 1)
    if first or norm:
        return PatchTile(64, block(width) if norm else min(256, block(width)), 64, 4, 3)
    cols = min(128, block(width))
    tall = ceil_div(rows, 128) * ceil_div(width, cols) >= device.multiprocessors
    return PatchTile(128 if tall else 64, cols, 64, 8 if tall else 4, 3)


VARIANTS = (
    PatchTile(128, 128, 64, 8, 3),
    PatchTile(128, 128, 64, 4, 3),
    PatchTile(128, 256, 64, 8, 3),
    PatchTile(64, 256, 64, 4, 3),
    PatchTile(64, 128, 64, 4, 3),
    PatchTile(64, 128, 32, 4, 4),
)
