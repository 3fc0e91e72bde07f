"""A head whose logits are divided by a temperature that was fitted after training.

    (1)  z = (W x + b) / T,  x [B, C], W [K, C], b [K]

Guo et al. 2017, section 4.2. Folding divides the weights once.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn


class CalibratedLinear(nn.Linear):
    """Compute logits by (1); made of a trained head by :meth:`of`.

    Attributes:
        temperature: T.
    """

    temperature: float = 1.0

    @classmethod
    def of(cls, linear: nn.Linear, temperature: float) -> Self:
        """Return a head that shares the parameters of ``linear``."""
        found = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        found.weight = linear.weight
        found.register_parameter("bias", linear.bias)
        found.temperature = float(temperature)
        return found.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C] to calibrated logits [B, K]."""
        return super().forward(input) / self.temperature

    def extra_repr(self) -> str:
        """Describe the sizes and the temperature."""
        return f"{super().extra_repr()}, temperature={self.temperature:.4g}"
