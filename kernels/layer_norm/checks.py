"""Which shapes and dtypes the operations on rows take."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import why_not_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (Tensor, torch.nn.Parameter)
MIN_WIDTH, MAX_WIDTH = 8, 8192  # a program holds whole rows


def check_vectors(
    x: Tensor, weight: Tensor, bias: Tensor, names: tuple[str, str] = ("weight", "bias")
) -> None:
    """Raise ValueError unless weight and bias have the shape [C] for x [..., C]."""
    width = x.shape[-1] if x.dim() else None
    for name, t in zip(names, (weight, bias), strict=True):
        if tuple(t.shape) != (width,):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; expected [C={width}] for x {tuple(x.shape)}"
            )


def why_not_triton(x: Tensor, *parameters: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Say why the kernels cannot take x [..., C] and parameters, or write ``dtype``.

    Returns:
        A phrase for an error message; ``None`` if they can.
    """
    reason = why_not_device(x)
    if reason is not None:
        return reason
    where = x.get_device()  # a number: comparing devices themselves takes longer
    for t in (x, *parameters):
        if t.dtype not in DTYPES:
            return f"dtype {t.dtype}; the kernels take float32, bfloat16 and float16"
        if t.get_device() != where:
            return f"tensors on {x.device} and {t.device}"
        if type(t) not in PLAIN:
            return f"a {type(t).__name__}; the kernels take plain tensors"
    if x.numel() == 0:
        return f"x is empty: {tuple(x.shape)}"
    if not MIN_WIDTH <= x.shape[-1] <= MAX_WIDTH:
        return f"{x.shape[-1]} channels; the kernels take {MIN_WIDTH} to {MAX_WIDTH}"
    if x.numel() // x.shape[-1] >= 2**31 - 2**20:
        return f"{x.numel() // x.shape[-1]} rows; the kernels take fewer than 2³¹"
    return None if dtype in (None, *DTYPES) else f"output in {dtype}"


def default_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a norm's output where nobody asks for another: PyTorch's policy."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of all tensors, or fp32 where they differ.

    Gradients of several parameters leave one kernel in this dtype; autograd casts the rest.
    """
    first = tensors[0].dtype
    return first if all(t.dtype == first for t in tensors) else torch.float32
