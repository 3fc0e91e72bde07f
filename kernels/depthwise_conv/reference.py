"""Depthwise convolution in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    padding_end: int | None = None,
) -> Tensor:
    """Convolve each channel with a filter of its own.

    Args:
        x: [B, C, H, W].
        weight: [C, 1, K, K]; cast to the dtype of ``x``.
        bias: [C] or ``None``; cast likewise.
        stride: of both axes.
        padding: zeros on each side of both axes.
        padding_end: zeros after the last row and column, if not as many as before the first.

    Returns:
        [B, C, H', W'], H' = (H + padding + padding_end - K) // stride + 1.

    Source: ``torch.nn.functional.conv2d`` with as many groups as channels.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if padding_end is not None and padding_end != padding:
        x, padding = F.pad(x, (padding, padding_end) * 2), 0
    return F.conv2d(x, weight.to(x.dtype), bias, stride, padding, 1, x.shape[1])
