"""Padding for the bulk copies, which need aligned rows of whole 16 bytes.

Other widths and ranks are padded with zeros, which change nothing, and cut off again.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..common.arithmetic import ceil_div


def multiple_of_8(n: int) -> int:
    """Round up to what rows of half precision need."""
    return ceil_div(n, 8) * 8


def align(t: Tensor, dims: int) -> Tensor:
    """Return t contiguous and aligned; ``dims`` as for :func:`pad`, which this stands for."""
    t = t if t.is_contiguous() else t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def pad(t: Tensor, dims: int) -> Tensor:
    """Return t contiguous and aligned, its last ``dims`` dimensions padded to multiples of 8."""
    missing = [-n % 8 for n in t.shape[: -dims - 1 : -1]]
    if any(missing):
        return F.pad(t, [p for n in missing for p in (0, n)])
    return align(t, dims)


def unpad(t: Tensor, width: int, dims: int = 1) -> Tensor:
    """Cut the last ``dims`` dimensions of t off after ``width``."""
    if t.shape[-1] == width:
        return t
    return (t[..., :width] if dims == 1 else t[..., :width, :width]).contiguous()
