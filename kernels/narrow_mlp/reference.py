"""An MLP with a residual sum in plain PyTorch: the ground truth of the kernel."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Gelu = Literal["none", "tanh"]


def narrow_mlp_reference(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor,
    approximate: Gelu = "none",
) -> Tensor:
    """Compute the MLP; arguments as :func:`~.op.narrow_mlp`."""
    hidden = F.gelu(F.linear(x, fc1_weight, fc1_bias.to(x.dtype)), approximate=approximate)
    return residual + F.linear(hidden, fc2_weight, fc2_bias.to(x.dtype)).to(residual.dtype)
