"""Update the attention weights of both branches by coupled low-rank matrices.

For layer l, with A [r, d], B [3·d, r] or [d, r], and S [r] per branch:

    (1) [S'_vision, S'_text] = [S_vision, S_text] + [S_vision, S_text] · M      [r, 2], M [2, 2]
    (2) W'_in  = W_in  + (alpha / r) / 4 · B_in · diag(S') · A_in               [3·d, d]
    (3) W'_out = W_out + (alpha / r) · B_out · A_out                            [d, d]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError

# Upstream divides the update of in_proj by 4, whatever the rank; trained weights depend on it.
IN_PROJ_DIVISOR = 4


class LowRankUpdate(NamedTuple):
    """Hold the updates of one attention layer, ``W + b @ a``; b contains the scales.

    Attributes:
        in_a: [r, d].
        in_b: [3·d, r].
        out_a: [r, d].
        out_b: [d, r].
    """

    in_a: Tensor
    in_b: Tensor
    out_a: Tensor
    out_b: Tensor


class LowRankBranch(nn.Module):
    """Hold the low-rank weights of one branch, stacked over its layers.

    Attributes:
        in_proj_A: [L, r, d]; in_proj_B: [L, 3·d, r]; in_proj_S: [L, r].
        out_proj_A: [L, r, d]; out_proj_B: [L, d, r].
    """

    def __init__(self, width: int, layers: int, rank: int):
        super().__init__()
        self.in_proj_A = nn.Parameter(torch.empty(layers, rank, width))
        self.in_proj_B = nn.Parameter(torch.empty(layers, 3 * width, rank))
        self.in_proj_S = nn.Parameter(torch.ones(layers, rank))
        self.out_proj_A = nn.Parameter(torch.empty(layers, rank, width))
        self.out_proj_B = nn.Parameter(torch.zeros(layers, width, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as upstream does: Xavier for in_proj; out_proj's update starts at zero."""
        with torch.no_grad():
            for weight in (self.in_proj_A, self.in_proj_B):
                bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
                weight.uniform_(-bound, bound)
            bound = 1 / math.sqrt(self.out_proj_A.shape[2])
            self.out_proj_A.uniform_(-bound, bound)
            self.out_proj_B.zero_()
            self.in_proj_S.fill_(1)

    def updates(
        self, scales: Tensor, scaling: float, dtype: torch.dtype | None
    ) -> list[LowRankUpdate]:
        """Return one update per layer; ``scales`` is S' [L, r], ``scaling`` alpha / r."""
        in_b = self.in_proj_B * (scales * (scaling / IN_PROJ_DIVISOR))[:, None]
        stacks = (self.in_proj_A, in_b, self.out_proj_A, self.out_proj_B * scaling)
        # Cast for all layers at once, so that their gradients are stacked at once.
        layers = zip(*(stack.to(dtype).unbind(0) for stack in stacks), strict=True)
        return [LowRankUpdate(*layer) for layer in layers]


class CoupledLowRank(nn.Module):
    """Compute the low-rank updates of the first attention layers of both branches.

    The branches share what they learn through the 2×2 relation M, which starts at zero; see the
    module's equations.

    Args:
        vision_width, text_width: of the branches.
        layers: how many layers of each branch get an update, from the first on.
        rank: r.
        alpha: scale of the updates.

    Raises:
        InputError: fewer than one layer, or a rank below 1.

    Source: GDPL, low-rank adaptation; upstream ``loralib.MultiheadAttention`` and
    ``lora_relation``. (Upstream re-creates S as a new parameter in every step, so that there
    neither S nor the relation gets gradients; by the formula, as here, both do.)
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        layers: int = 9,
        rank: int = 4,
        alpha: float = 1.0,
    ):
        super().__init__()
        if layers < 1 or rank < 1:
            raise InputError(f"layers is {layers} and rank {rank}; expected at least 1 of each")
        self.alpha = alpha
        self.rank = rank
        self.vision = LowRankBranch(vision_width, layers, rank)
        self.text = LowRankBranch(text_width, layers, rank)
        self.relation = nn.Parameter(torch.zeros(2, 2))

    @property
    def layers(self) -> int:
        """Return the number of layers with an update."""
        return len(self.vision.in_proj_S)

    def forward(
        self, dtype: torch.dtype | None = None
    ) -> tuple[list[LowRankUpdate], list[LowRankUpdate]]:
        """Return the updates of vision and text, one per layer, cast to ``dtype``."""
        scales = torch.stack([self.vision.in_proj_S, self.text.in_proj_S], dim=-1)
        vision, text = (scales + scales @ self.relation).unbind(-1)
        scaling = self.alpha / self.rank
        return (
            self.vision.updates(vision, scaling, dtype),
            self.text.updates(text, scaling, dtype),
        )

    def extra_repr(self) -> str:
        """Describe the sizes for ``repr``."""
        return f"layers={self.layers}, rank={self.rank}, alpha={self.alpha:g}"
