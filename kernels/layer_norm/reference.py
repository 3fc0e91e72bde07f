"""LayerNorm and its companions in plain PyTorch: the ground truth of the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalize rows in plain PyTorch; arguments as :func:`~.op.layer_norm`."""
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y if dtype is None else y.to(dtype)


def add_layer_norm_reference(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add and normalize in plain PyTorch; arguments as :func:`~.op.add_layer_norm`."""
    total = (x.float() + branch.float()).to(x.dtype)
    # On a GPU, PyTorch's norm takes arguments of one dtype only.
    normal = layer_norm_reference(total.float(), weight.float(), bias.float(), eps, dtype=dtype)
    return total, normal


def layer_norm_twice_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    eps: float = 1e-5,
    second_eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalize rows twice in plain PyTorch; arguments as :func:`~.op_twice.layer_norm_twice`."""
    y = layer_norm_reference(x, weight, bias, eps)
    return layer_norm_reference(y, second_weight, second_bias, second_eps, dtype=dtype)


def layer_norm_mean_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalize and average in plain PyTorch; arguments as :func:`~.op_mean.layer_norm_mean`."""
    return layer_norm_reference(x, weight, bias, eps).mean(-2)
