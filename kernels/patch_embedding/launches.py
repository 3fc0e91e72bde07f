"""The launch of the product with patches."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Box, Device, Launch, device_of
from .block_sizes import PatchTile, tile_for
from .checks import Norm
from .triton_kernels import patch_embedding_kernel


def embed(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    patch: int,
    tokens: int,
    norm: Norm | None = None,
    tile: PatchTile | None = None,
) -> Tensor:
    """Multiply the patches of contiguous x [B, H, W, D], with the rule's tile or another."""
    width, depth = weight.shape
    out = weight.new_empty(len(x), tokens, width)
    device = device_of(x.device.index)
    rows = len(x) * tokens
    if tile is None:
        first, has_norm = x.dtype == torch.uint8, norm is not None
        tile = tile_for(rows, depth, width, weight.element_size(), first, has_norm, device)
    dtypes = (x.dtype, weight.dtype, table.dtype, *(t.dtype for t in (norm or ())[:2]))
    eps = None if norm is None else norm.eps
    launch = prepare(
        tuple(x.shape), (width, patch, tokens), table.dim() == 2, eps, tile, dtypes, device
    )
    vectors = () if norm is None else (norm.weight.contiguous(), norm.bias.contiguous())
    launch(x, weight, table, out, *vectors)
    return out


@functools.lru_cache(maxsize=1024)
def prepare(
    shape: tuple[int, ...],
    sizes: tuple[int, int, int],
    by_token: bool,
    eps: float | None,
    tile: PatchTile,
    dtypes: tuple[torch.dtype, ...],
    device: Device,
) -> Launch:
    """Prepare the launch for a size and a tile; the kernel begins to compile."""
    batch, height, across, channels = shape
    width, patch, tokens = sizes
    rows, depth = batch * tokens, patch * patch * channels
    image, weight, table, *vectors = dtypes
    return Launch(
        patch_embedding_kernel,
        (ceil_div(rows, tile.rows) * ceil_div(width, tile.cols),),
        device,
        (rows, tokens, tokens - height * across // patch**2, height, across),
        (
            width,
            depth,
            channels,
            patch,
            by_token,
            image == torch.uint8,
            eps,
            tile.rows,
            tile.cols,
            tile.depth,
        ),
        warps=tile.warps,
        stages=tile.stages,
        tensors=(
            (0, None),
            (1, Box((width, depth), (tile.cols, tile.depth))),
            (2, None),
            (3, None),
            (4, None) if vectors else None,
            (5, None) if vectors else None,
        ),
        dtypes=(image, weight, table, weight, *vectors),
    )
