"""Dropout that draws its mask quickly on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastadapt.kernels.common.arithmetic import ceil_div

LEVELS = 2**16  # the probability is a multiple of 1 / LEVELS


class Dropout(nn.Dropout):
    """``nn.Dropout``; on a CPU four values share one random number of 64 bits.

    PyTorch draws a number a value there, one after the other, which takes as long as a product of
    matrices. The probability is rounded to a multiple of 2⁻¹⁶, and values are scaled accordingly.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Set values to zero with probability ``p`` in training, and scale the others."""
        dropped = round(self.p * LEVELS)
        if not self.training or x.device.type != "cpu" or dropped in (0, LEVELS) or self.inplace:
            return super().forward(x)
        if torch.compiler.is_compiling():
            return super().forward(x)
        numbers = torch.empty(ceil_div(x.numel(), 4), dtype=torch.int64).random_(-(2**63), None)
        bits = numbers.view(torch.int16)[: x.numel()].view(x.shape)
        return x * (bits >= dropped - LEVELS // 2).to(x.dtype).mul_(LEVELS / (LEVELS - dropped))
