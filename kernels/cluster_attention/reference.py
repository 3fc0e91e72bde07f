"""Cluster attention in plain PyTorch: the ground truth of the kernels and of upstream's formula.

Shapes: B samples, N tokens, C channels, K centers, R rank.

(1)  q   = mean over tokens of x                                         [B, C]
(2)  a   = softmax(normalize(q) @ normalize(centers, dim=0))             [B, K]
(3)  T_b = sum_k a[b, k] · transforms[k]                                 [B, R, R] or [B, N, N]
(4)  channel mode:  y = ((x @ downᵀ + down_bias) @ T_b) @ upᵀ + up_bias  [B, N, C]
     token mode:    y = T_b @ x                                          [B, N, C]

Source: CLAdapter (Li et al. 2025), section 3, equations 1-4; upstream ``models/modules.py``,
``Cluster_Attention``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import accumulate_dtype, compute_dtype


def center_attention(x: Tensor, centers: Tensor) -> Tensor:
    """Return how much of each center a sample takes: cosine to its mean token, softmax over K.

    Args:
        x: [B, N, C].
        centers: [C, K].

    Returns:
        [B, K], fp32 (fp64 if ``x`` is), rows summing to one.
    """
    dtype = accumulate_dtype(x.dtype)
    q = F.normalize(x.mean(dim=1, dtype=dtype), dim=-1)
    return (q @ F.normalize(centers.to(dtype), dim=0)).softmax(dim=-1)


def cluster_attention_reference(
    x: Tensor,
    centers: Tensor,
    transforms: Tensor,
    down_weight: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Compute cluster attention in plain PyTorch; see ``cluster_attention`` for the arguments.

    The transforms are mixed by one product of [B, K] with [K, R·R], so that upstream's
    [B, K, R, R] never exists.
    """
    dtype = compute_dtype(x)
    x = x.to(dtype)
    # Half precision is for the products over channels; the few numbers that decide the mixing
    # stay in fp32, also under autocast.
    with torch.autocast(x.device.type, enabled=False):
        a = center_attention(x, centers).to(dtype)
        rows, cols = transforms.shape[1:]
        mixed = (a @ transforms.to(dtype).flatten(1)).unflatten(1, (rows, cols))
        if down_weight is None or up_weight is None:
            return mixed @ x
        h = F.linear(x, down_weight.to(dtype), None if down_bias is None else down_bias.to(dtype))
        return F.linear(
            h @ mixed, up_weight.to(dtype), None if up_bias is None else up_bias.to(dtype)
        )
