"""Depthwise convolution and normalisation in plain PyTorch: the ground truth of the kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.e4m3 import to_e4m3
from .checks import SIZE


def depthwise_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    factor: float | None = None,
) -> Tensor:
    """Convolve and normalize; arguments as :func:`~.op.depthwise_norm`.

    Source: timm's ``ConvNeXtBlock``, without the norm's weight and bias.
    """
    channels = x.shape[-1]
    filters = weight.to(x.dtype).t().reshape(channels, 1, SIZE, SIZE)
    y = F.conv2d(x.permute(0, 3, 1, 2), filters, None, 1, SIZE // 2, 1, channels)
    y = y.permute(0, 2, 3, 1) + bias.to(x.dtype)
    y = F.layer_norm(y, (channels,), None, None, eps).contiguous()
    return y.to(dtype or x.dtype) if factor is None else to_e4m3(y, factor)
