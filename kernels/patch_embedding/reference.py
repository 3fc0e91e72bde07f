"""The product with patches in plain PyTorch: the ground truth of the kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Norm

CENTER = 128  # of the bytes of an image; weights of uint8 images are made for bytes minus this


def patch_embedding_reference(
    x: Tensor, weight: Tensor, table: Tensor, patch: int, norm: Norm | None = None
) -> Tensor:
    """Multiply patches with a weight; arguments as :func:`~.op.patch_embedding`.

    Source: timm's ``PatchEmbed``, whose convolution has patches as large as its steps.
    """
    batch, height, width, _ = x.shape
    dtype = weight.dtype
    x = x.to(dtype) - CENTER if x.dtype == torch.uint8 else x
    x = x.unflatten(2, (width // patch, patch)).unflatten(1, (height // patch, patch))
    rows = x.transpose(2, 3).reshape(batch, -1, weight.shape[1])
    y = F.linear(rows, weight)
    prefix = 0 if table.dim() == 1 else len(table) - y.shape[1]
    y = F.pad(y, (0, 0, prefix, 0)) + table.to(dtype)
    if norm is not None:
        y = F.layer_norm(y, y.shape[-1:], norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
    return y
