"""Depthwise convolution in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:
    """Convolve each channel with a filter of its own.

    Args:
        x: [B, C, H, W].
        weight: [C, 1, K, K]; cast to the dtype of ``x``.
        bias: [C] or ``None``; cast likewise.
        stride: of both axes.
        padding: zeros on each side of both axes.

    Returns:
        [B, C, H', W'], H' = (H + 2·padding - K) // stride + 1.

    Source: ``torch.nn.functional.conv2d`` with as many groups as channels.
    """
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype), bias, stride, padding, 1, x.shape[1])
