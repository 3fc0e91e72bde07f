"""The launch of the narrow MLP."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Box, Device, Launch, block, device_of
from .block_sizes import MlpTile, tile_for
from .reference import Gelu
from .triton_kernels import narrow_mlp_kernel


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor,
    tile: MlpTile | None = None,
    approximate: Gelu = "none",
) -> Tensor:
    """Compute the MLP of contiguous tensors, with the rule's tile or another."""
    rows, width = x.shape
    out = torch.empty_like(residual)
    device = device_of(x.device.index)
    tile = tile or tile_for(rows, width, x.dtype, device)
    dtypes = (x.dtype, fc1_bias.dtype, fc2_bias.dtype, residual.dtype)
    launch = prepare((rows, width, len(fc1_weight)), approximate, tile, dtypes, device)
    launch(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, residual, out)
    return out


@functools.lru_cache(maxsize=1024)
def prepare(
    sizes: tuple[int, int, int],
    approximate: Gelu,
    tile: MlpTile,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
    device: Device,
) -> Launch:
    """Prepare the launch for a size and a tile; the kernel begins to compile."""
    rows, width, hidden = sizes
    cols = block(width)
    own = Box((rows, width), (tile.rows, cols))
    kind, first, second, sums = dtypes
    return Launch(
        narrow_mlp_kernel,
        (ceil_div(rows, tile.rows),),
        device,
        (width, hidden),
        (tile.rows, cols, tile.hidden, approximate == "tanh"),
        warps=tile.warps,
        stages=tile.stages,
        tensors=(
            (0, own),
            (1, Box((hidden, width), (tile.hidden, cols))),
            (2, None),
            (3, Box((width, hidden), (cols, tile.hidden))),
            (4, None),
            (5, own),
            (6, own),
        ),
        dtypes=(kind, kind, first, kind, second, sums, sums),
    )
