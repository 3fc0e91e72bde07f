"""Depthwise convolution 7 × 7 and normalisation over channels, channels last.

For x [B, H, W, C], taps w [49, C], t = 7·i + j, and a bias b [C] or [H, W, C], with zeros beyond
the image:

    (1)  y[n, h, w]  = b + sum over t of w[t] · x[n, h + i − 3, w + j − 3]      [C]  fp32
    (2)  out         = (y − mean of y) · (variance of y + eps)^(−1/2)           [C]

over all C channels of a pixel. The weight and bias of the LayerNorm after ConvNeXt's convolution
belong in the linear layer that follows it. A bias for every pixel lets a constant that was left out
of x be added after the convolution, whose borders see less of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import choose_backend, on_device, without_autocast
from ..common.e4m3 import why_not_e4m3
from .checks import check_shapes, why_not_triton
from .reference import depthwise_norm_reference


def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    factor: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with its 7 × 7 filter and normalize; for inference, no gradient.

    Args:
        x: [B, H, W, C]; fp32, bf16 or fp16.
        weight: [49, C], the taps in the order of rows, of any of these dtypes.
        bias: [C], or [H, W, C] for every pixel, of any of these dtypes.
        eps: added to the variance.
        dtype: of the result; ``None``: x's.
        factor: round the result times this to e4m3.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [B, H, W, C], contiguous.

    Raises:
        ValueError: a shape does not fit; the message names it.
        BackendError: ``backend="triton"`` and the kernel does not cover the call.
    """
    check_shapes(x, weight, bias)
    dtype = dtype or x.dtype
    reason = why_not_triton(x, weight, bias, dtype) or (factor and why_not_e4m3(x))
    if choose_backend(backend, reason or None) == "reference":
        return depthwise_norm_reference(x, weight, bias, eps, dtype=dtype, factor=factor)
    from . import launches  # Triton is imported with the first call

    with on_device(x), without_autocast(x):
        tensors = (x.contiguous(), weight.contiguous(), bias.contiguous())
        return launches.convolve(*tensors, eps, dtype=dtype, factor=factor)
