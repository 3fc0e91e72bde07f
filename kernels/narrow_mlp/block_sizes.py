"""The rules for tiles and warps of the narrow MLP, and variants that are worth timing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..common import tuning
from ..common.launcher import Device

OPERATION = "narrow_mlp"


class MlpTile(NamedTuple):
    """Launch configuration: rows of a program, hidden columns at a time, warps and stages."""

    rows: int
    hidden: int
    warps: int
    stages: int


def tile_for(rows: int, width: int, dtype: torch.dtype, device: Device) -> MlpTile:
    """Choose the tile.

    Args:
        rows: M.
        width: C.
        dtype: of the tensors.
        device: where it runs.
    """
    if device.index is not None:
        choice = tuning.chosen(OPERATION, device.index, (rows, width))
        if choice:
            return MlpTile(**choice)
    if dtype == torch.float32:
        return MlpTile(16, 16, 4, 1)
    return MlpTile(64, 32, 4, 3 if device.has_tall_products else 2)


VARIANTS = (
    MlpTile(64, 32, 4, 3),
    MlpTile(64, 64, 4, 2),
    MlpTile(64, 64, 4, 3),
    MlpTile(128, 32, 8, 3),
    MlpTile(128, 64, 8, 2),
    MlpTile(128, 64, 8, 3),
    MlpTile(256, 32, 16, 2),
)
