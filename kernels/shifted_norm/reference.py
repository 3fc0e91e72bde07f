"""LayerNorm of shifted rows in plain PyTorch: the ground truth of the kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import accumulate_dtype
from ..common.e4m3 import to_e4m3


def shifted_norm_reference(
    x: Tensor,
    shift: Tensor | None,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    factor: float | None = None,
) -> Tensor:
    """Normalize shifted rows; arguments as :func:`~.op.shifted_norm`."""
    wide = accumulate_dtype(x.dtype)
    y = x.to(wide) if shift is None else x.to(wide) + shift.to(wide)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    y = F.layer_norm(y, y.shape[-1:], weight, bias, eps)
    return y.to(x.dtype) if factor is None else to_e4m3(y, factor)
