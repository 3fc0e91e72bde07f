"""Self-attention of a packed product, in plain PyTorch: the ground truth of the kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .checks import HeadNorms


def qkv_attention_reference(
    qkv: Tensor, heads: int, *, scale: float | None = None, norms: HeadNorms | None = None
) -> Tensor:
    """Compute self-attention; arguments as :func:`~.op.qkv_attention`.

    Source: timm's ``Attention``, between its two products.
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if norms is not None:
        size, dtype = (q.shape[-1],), q.dtype
        q = F.layer_norm(q, size, norms.q_weight.to(dtype), norms.q_bias.to(dtype), norms.eps)
        k = F.layer_norm(k, size, norms.k_weight.to(dtype), norms.k_bias.to(dtype), norms.eps)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2)
