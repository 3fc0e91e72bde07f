"""The residual MLP in plain PyTorch: the ground truth of the kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..layer_norm.reference import layer_norm_reference


def residual_mlp_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Compute the residual MLP in plain PyTorch; arguments as :func:`~.op.residual_mlp`."""
    h = F.linear(layer_norm_reference(x, ln_weight, ln_bias, eps), fc1_weight, fc1_bias)
    return x + F.linear(F.gelu(h), fc2_weight, fc2_bias)


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a linear layer and GELU in plain PyTorch; arguments as :func:`~.op.linear_gelu`."""
    return F.gelu(F.linear(x, weight, bias.to(x.dtype)))
