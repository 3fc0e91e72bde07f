"""Numbers in e4m3: what operations that read or write them share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
CAPABILITY = (8, 9)  # from which on GPUs multiply them


def to_e4m3(x: Tensor, factor: float = 1.0) -> Tensor:
    """Round ``x · factor`` to e4m3; what is too large becomes the largest number."""
    return (x.float() * factor).clamp(-LARGEST, LARGEST).to(E4M3)


def why_not_e4m3(x: Tensor) -> str | None:
    """Say why kernels on x's device cannot read or write e4m3; ``None`` if they can."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return "the GPU knows no e4m3: that needs compute capability 8.9"
    return None


def norm_factor(channels: int) -> float:
    """Return the power of two by which rows are multiplied that were normalised over ``channels``.

    No number of such a row exceeds √channels, so that none is cut off, whatever the images.
    """
    return 2.0 ** math.floor(math.log2(LARGEST / math.sqrt(channels)))
