"""Which shapes and dtypes the residual MLP takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import compute_dtype
from ..layer_norm import checks


def check_shapes(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
) -> None:
    """Raise ValueError for shapes that do not fit x [..., C] and fc1_weight [H, C]."""
    checks.check_vectors(x, ln_weight, ln_bias)
    width, hidden = x.shape[-1], fc1_weight.shape[0]
    expected = {
        "fc1_weight": (fc1_weight, (hidden, width)),
        "fc1_bias": (fc1_bias, (hidden,)),
        "fc2_weight": (fc2_weight, (width, hidden)),
        "fc2_bias": (fc2_bias, (width,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {shape} for x {tuple(x.shape)}"
            )


def why_not_triton(x: Tensor, *parameters: Tensor) -> str | None:
    """Say why the kernels cannot take these tensors; ``None`` if they can."""
    reason = checks.why_not_triton(x, *parameters)
    if reason is None and x.dtype != compute_dtype(x):
        return f"x in {x.dtype} under autocast to {compute_dtype(x)}"
    return reason


def slope_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which GELU's slope is kept for tensors in ``dtype``.

    The slope lies between −0.13 and 1.13, where fp16 is eight times as exact as bf16.
    """
    return torch.float32 if dtype == torch.float32 else torch.float16
