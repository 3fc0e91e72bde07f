"""Which calls cuBLASLt takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.e4m3 import E4M3, why_not_e4m3

DTYPES = (torch.bfloat16, torch.float16, E4M3)
ALIGNMENT = 256  # bytes, of matrices: what cuBLASLt assumes where nothing else is said
MULTIPLE = {1: 16, 2: 8}  # of both sizes of a weight, by an element's bytes


class Epilogue(NamedTuple):
    """What follows a product; attributes as the arguments of :func:`~.op.linear_epilogue`."""

    alpha: float = 1.0
    gelu: bool = False
    factor: float | None = None
    residual: Tensor | None = None
    in_place: bool = True


def half_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a result in half precision, for x in ``dtype``."""
    return torch.bfloat16 if dtype == E4M3 else dtype


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raise ValueError for shapes and dtypes that do not fit x [M, K] and weight [N, K]."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x and weight have shapes {tuple(x.shape)} and {tuple(weight.shape)}; expected "
            "[M, K] and [N, K]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; expected one dtype")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected [N={len(weight)}]")
    if residual is not None and tuple(residual.shape) != (len(x), len(weight)):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; expected {(len(x), len(weight))}"
        )
    if residual is None:
        return
    half = half_of(x.dtype)
    if residual.dtype != half and (residual.dtype != torch.float32 or x.dtype == E4M3):
        raise ValueError(
            f"residual is {residual.dtype}; expected {half}, or torch.float32 for x in half "
            "precision"
        )


def why_not_cublas(x: Tensor, *others: Tensor | None) -> str | None:
    """Say why cuBLASLt cannot take a call with these tensors; ``None`` if it can.

    Args:
        x: [M, K].
        others: weight, bias and residual.
    """
    if not x.is_cuda or torch.version.hip is not None:
        return f"x is on device {x.device}; expected an NVIDIA GPU"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}; it takes bfloat16, float16 and e4m3"
    if x.dtype == E4M3 and (reason := why_not_e4m3(x)) is not None:
        return reason
    weight = others[0]
    multiple = MULTIPLE[x.element_size()]
    if weight is not None and any(size % multiple for size in weight.shape):
        return f"weight is {tuple(weight.shape)}; both sizes must be multiples of {multiple}"
    tensors = [t for t in (x, *others) if t is not None]
    if any(t.device != x.device for t in tensors):
        return "tensors are on several devices"
    if any(not t.is_contiguous() or t.data_ptr() % ALIGNMENT for t in tensors):
        return f"a tensor is not contiguous, or not aligned to {ALIGNMENT} bytes"
    return None
