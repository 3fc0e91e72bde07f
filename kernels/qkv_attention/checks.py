"""Which shapes and dtypes self-attention of a packed product takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import why_not_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (16, 32, 64, 128)
MAX_TOKENS = 4096  # beyond, PyTorch's kernels for long sequences are the better ones


class HeadNorms(NamedTuple):
    """LayerNorms of each head's queries and keys: vectors [D] in the dtype of q and k."""

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    eps: float


def check_shapes(qkv: Tensor, heads: int, norms: HeadNorms | None) -> None:
    """Raise ValueError for shapes that do not fit qkv [B, N, 3·H·D]."""
    if qkv.dim() != 3 or heads < 1 or qkv.shape[-1] % (3 * heads):
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; expected [B, N, 3·H·D] with H={heads} heads"
        )
    size = qkv.shape[-1] // (3 * heads)
    vectors: tuple[Tensor, ...] = () if norms is None else norms[:4]
    for name, t in zip(HeadNorms._fields, vectors, strict=False):
        if tuple(t.shape) != (size,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}; expected [D={size}]")


def why_not_triton(qkv: Tensor, heads: int, scale: float) -> str | None:
    """Say why the kernel cannot take this call; ``None`` if it can."""
    reason = why_not_device(qkv)
    if reason is not None:
        return reason
    if qkv.dtype not in DTYPES:
        return f"dtype {qkv.dtype}; the kernel takes float32, bfloat16 and float16"
    size = qkv.shape[-1] // (3 * heads)
    if size not in HEAD_DIMS:
        return f"{size} channels a head; the kernel takes {', '.join(map(str, HEAD_DIMS))}"
    if not 0 < qkv.shape[1] <= MAX_TOKENS or not len(qkv):
        return f"{len(qkv)} × {qkv.shape[1]} tokens; the kernel takes 1 to {MAX_TOKENS}"
    if scale <= 0:
        return f"scale {scale}; the kernel takes positive ones"
    if torch.is_grad_enabled() and qkv.requires_grad:
        return "gradients are on, and this operation has none"
    return None
