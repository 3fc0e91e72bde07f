"""Add low-rank updates to linear layers, fused ones included (LoRA).

With W [O, I] and pairs s of A_s [r_s, I], B_s [O_s, r_s] on rows start_s … stop_s of W:

    (1) y      = W · x + b                                [..., O]
    (2) y[s]   = y[s] + scaling_s · B_s · (A_s · x)       [..., O_s]    for every pair
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRASlice:
    """Name the rows of a linear layer that one low-rank pair acts on.

    Attributes:
        name: key of the pair in the layer's state dict (``"q"``, ``"v"``, ``"all"``).
        start, stop: rows of the base weight, ``stop`` excluded.
        r: rank.
        scaling: factor on ``B @ A`` (alpha / r, or alpha / sqrt(r) with rank stabilisation).
    """

    name: str
    start: int
    stop: int
    r: int
    scaling: float


class LoRALinear(nn.Module):
    """Add low-rank updates to a frozen linear layer: ``W + scaling · B @ A`` on chosen rows.

    ``weight`` is the effective weight, so code that reads the weight of the layer it wraps
    (timm's fused qkv with separate biases, nn.MultiheadAttention's output projection) sees the
    update as well; dropout applies on the layer's own forward only.

    Args:
        base: the layer; its parameters are frozen here.
        slices: the pairs, on disjoint or overlapping rows.
        dropout: on the input of the low-rank path, in training.

    Attributes:
        replaced: names of other parameters of the model that were loaded with this adapter and
            replaced the pretrained ones (:func:`fastadapt.load_peft`).
        claimed: whether an adapted model trains, or has trained, these adapters.

    Shape:
        [..., in_features] to [..., out_features].

    Source: LoRA (Hu et al. 2021); PEFT ``tuners/lora/layer.py`` for the initialisation.
    """

    def __init__(self, base: nn.Linear, slices: list[LoRASlice], dropout: float = 0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.slices = tuple(slices)
        self.replaced: frozenset[str] = frozenset()
        self.claimed = False
        self.dropout = nn.Dropout(dropout)
        where: Any = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.ParameterDict(
            {s.name: torch.empty(s.r, base.in_features, **where) for s in slices}
        )
        self.lora_B = nn.ParameterDict(
            {s.name: torch.empty(s.stop - s.start, s.r, **where) for s in slices}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A Kaiming-uniform and set B to zero: the layer starts as its base."""
        for a in self.lora_A.values():
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        for b in self.lora_B.values():
            nn.init.zeros_(b)

    @property
    def in_features(self) -> int:
        """Return the base layer's input width."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Return the base layer's output width."""
        return self.base.out_features

    @property
    def bias(self) -> Tensor | None:
        """Return the base layer's bias."""
        return self.base.bias

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the update of the whole weight [out_features, in_features], in ``dtype``."""
        dtype = dtype or self.base.weight.dtype
        update = torch.zeros_like(self.base.weight, dtype=dtype)
        for s in self.slices:
            product = s.scaling * (self.lora_B[s.name].to(dtype) @ self.lora_A[s.name].to(dtype))
            update = update + F.pad(product, (0, 0, s.start, self.out_features - s.stop))
        return update

    @property
    def weight(self) -> Tensor:
        """Return the effective weight [out_features, in_features]."""
        return self.base.weight + self.delta()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        y = self.base(x)
        dropped = self.dropout(x)
        for s in self.slices:
            update = F.linear(F.linear(dropped, self.lora_A[s.name]), self.lora_B[s.name])
            update = s.scaling * update
            if s.stop - s.start != self.out_features:
                update = F.pad(update, (s.start, self.out_features - s.stop))
            y = y + update
        return y

    def extra_repr(self) -> str:
        """Describe the sizes and the pairs for ``repr``."""
        pairs = ", ".join(f"{s.name}: r={s.r}, scaling={s.scaling:g}" for s in self.slices)
        return f"in_features={self.in_features}, out_features={self.out_features}, {pairs}"
