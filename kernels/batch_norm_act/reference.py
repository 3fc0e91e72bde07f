"""Batch norm in training and an activation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}


def batch_norm_act_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Normalize each channel by the batch's mean and variance, then apply the activation.

    Args:
        x: [B, C, H, W].
        weight, bias: [C].
        running_mean, running_var: [C] or ``None``; updated in place.
        momentum: the share of this batch in the running statistics.
        eps: added to the variance.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"silu"``.

    Returns:
        As ``x``.

    Source: ``torch.nn.functional.batch_norm`` with ``training=True`` (Ioffe and Szegedy 2015).
    """
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    return ACTIVATIONS[activation](y)
