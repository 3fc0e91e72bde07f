"""The launch of self-attention of a packed product."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.launcher import Box, Device, Launch, device_of
from .block_sizes import AttentionTile, tile_for
from .checks import HeadNorms
from .triton_kernels import qkv_attention_kernel

MOST_UNROLLED = 4  # tiles of keys


def attention(
    qkv: Tensor,
    heads: int,
    scale: float,
    norms: HeadNorms | None = None,
    tile: AttentionTile | None = None,
) -> Tensor:
    """Compute self-attention of contiguous qkv [B, N, 3·H·D], with the rule's tile or another."""
    batch, tokens, width = qkv.shape
    size = width // (3 * heads)
    out = qkv.new_empty(batch, tokens, heads * size)
    device = device_of(qkv.device.index)
    tile = tile or tile_for(tokens, size, qkv.element_size(), device)
    problem = (batch, tokens, heads, size, scale, norms and norms.eps)
    launch = prepare(problem, tile, qkv.dtype, device)
    launch(qkv, out, *(t.to(qkv.dtype).contiguous() for t in (norms or ())[:4]))
    return out


@functools.lru_cache(maxsize=1024)
def prepare(problem: tuple, tile: AttentionTile, dtype: torch.dtype, device: Device) -> Launch:
    """Prepare the launch for a size and a tile; the kernel begins to compile."""
    batch, tokens, heads, size, scale, eps = problem
    shape, out = (batch, tokens, 3 * heads * size), (batch, tokens, heads * size)
    whole = tokens // tile.keys
    norms = [(number, None) for number in range(2, 6)] if eps is not None else [None] * 4
    return Launch(
        qkv_attention_kernel,
        (batch * heads * ceil_div(tokens, tile.queries),),
        device,
        (tokens, heads),
        (
            size,
            scale * math.log2(math.e),
            eps,
            tile.queries,
            tile.keys,
            tile.rest,
            whole,
            whole <= MOST_UNROLLED,
        ),
        warps=tile.warps,
        stages=tile.stages,
        tensors=(
            (0, Box(shape, (1, tile.queries, size))),
            (0, Box(shape, (1, tile.keys, size))),
            (0, Box(shape, (1, tile.rest or tile.keys, size))),
            (1, Box(out, (1, tile.queries, size))),
            *norms,
        ),
        dtypes=(dtype,) * (6 if eps is not None else 2),
    )
