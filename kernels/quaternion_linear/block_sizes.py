"""The rules for tiles, warps, stages and splits of the quaternion kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common.arithmetic import ceil_div
from ..common.launcher import Device
from .form import Form


class ProductTile(NamedTuple):
    """Launch configuration of a product: its tile, warps, stages, and splits of the reduction.

    On Hopper, tiles of 64 rows have four warps: with eight, Triton 3.6 lays out some of the
    products that are accumulated over 128 rows, and they read beyond the tile.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    splits: int = 1


def linear_tile(
    rows: int, depth: int, width: int, groups: int, form: Form, device: Device
) -> ProductTile:
    """Choose the tile of the output, and of the gradient of x."""

    def tiles(tile: ProductTile) -> int:
        return ceil_div(rows, tile.rows) * ceil_div(width, tile.cols) * groups

    large = ProductTile(64, 64, 32, 4, 2 if form.rotation else 3)
    if form.dtype == torch.float32:
        # Without tensor cores: short, or the operands fill the registers.
        tile = ProductTile(16 if rows <= 64 else 32, 32, 16, 8, 2)
    elif device.has_tall_products and tiles(large) >= device.multiprocessors:
        tile = large
    elif form.rotation:
        tile = ProductTile(16, 32, 32, 4, 3)
    else:
        tile = ProductTile(16, 32, 64, 4, 4 if depth >= 512 else 3)
    # Partials need a second kernel: worth it only for long reductions.
    least = 2 if form.rotation or form.dtype == torch.float32 else 8
    splits = min(4, device.multiprocessors // tiles(tile), ceil_div(depth, tile.depth) // least)
    return tile._replace(splits=max(1, splits))


def gradient_tile(
    rows: int, inputs: int, outputs: int, groups: int, form: Form, device: Device
) -> ProductTile:
    """Choose the tile of the weights' gradients, whose ``depth`` runs over the rows of x."""

    def tiles(tile: ProductTile) -> int:
        return ceil_div(inputs, tile.rows) * ceil_div(outputs, tile.cols) * groups

    tall = ProductTile(64, 32, 64, 4, 2)
    if form.dtype == torch.float32:
        tile = ProductTile(32, 32, 16, 8, 2)
    elif form.rotation:
        tile = ProductTile(64, 16, 32, 4, 2)
    elif rows <= 16:
        shapes = (ProductTile(64, 64, 16, 4, 2), ProductTile(64, 32, 16, 4, 2))
        crowded = (t for t in shapes if tiles(t) >= device.multiprocessors)
        tile = next(crowded, ProductTile(32, 32, 16, 4, 2))
    elif device.has_tall_products and tiles(tall) >= device.multiprocessors:
        tile = tall._replace(stages=2 if rows <= 256 else 3)
    else:
        tile = ProductTile(16, 32, 64, 4, 2)
    splits = min(32, device.multiprocessors // tiles(tile), ceil_div(rows, tile.depth) // 4)
    return tile._replace(splits=max(1, splits))


def depth_per_split(size: int, tile: ProductTile) -> int:
    """Divide a reduction over ``size`` among the splits, in whole tiles."""
    return ceil_div(size, tile.splits * tile.depth) * tile.depth


def hopper_columns(width: int, others: int, device: Device) -> int:
    """Choose the columns of a tile of Hopper's kernel.

    The widest that divides ``width``, a multiple of 64, and keeps most programs busy.

    Args:
        width: columns of one component of the result.
        others: tiles for each of those columns' blocks.
    """
    widths = [n for n in (256, 128, 64) if width % n == 0]
    busy = (n for n in widths if others * (width // n) >= 0.75 * device.multiprocessors)
    return next(busy, widths[-1])
