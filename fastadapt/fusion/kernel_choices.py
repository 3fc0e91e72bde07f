"""Which kernels compute fused blocks, in training and in a fused model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fastadapt.kernels.narrow_mlp.reference import Gelu


@dataclass(frozen=True)
class Choices:
    """How a model's operations are computed; every way computes the same up to rounding.

    Attributes:
        attention: ``"kernel"``: ours; ``"library"``: PyTorch's, on views of the product.
        narrow: compute MLPs of few channels in one kernel (ConvNeXt).
        gelu: ``"tanh"``: GELU's tanh form, at most 5e-4 off, which costs little after a product;
            ``"none"``: as it is. PyTorch's names.
    """

    attention: Literal["kernel", "library"] = "kernel"
    narrow: bool = False
    gelu: Gelu = "none"


# Up to here our attention is the faster one: 9.3 µs to 11.6 for 8 images of ViT-B/16 on an H100,
# where for 64 images cuDNN's takes 45.6 to 62.3.
FEW_TOKENS = 2048
# From here on every multiprocessor has two programs of the narrow MLP's kernel.
MANY_TOKENS = 16384


def default_choices(tokens: int, dtype: torch.dtype, device: torch.device) -> Choices:
    """Choose by the tokens (or pixels of the first map) of all images, the dtype and the GPU.

    What is chosen on Hopper was the fastest there, of ViT-B/16 and ConvNeXt-B at 1, 8, 64 and 256
    images. Elsewhere PyTorch's attention and exact GELU stand.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
        return Choices(attention="library")
    return Choices(
        attention="kernel" if tokens <= FEW_TOKENS else "library",
        narrow=tokens >= MANY_TOKENS,
        gelu="none" if dtype == torch.float32 else "tanh",
    )
