"""Mix learned transforms per sample and apply them to its tokens, as a module.

With x [B, N, C], centers [C, K], transforms T [K, R, R] (channel mode) or [K, N, N] (token mode):

    (1) q   = mean over tokens of x                                      [B, C]
    (2) a   = softmax over K of normalize(q) · normalize(centers)        [B, K]
    (3) T_b = sum over k of a[b, k] · T[k]                               [B, R, R] or [B, N, N]
    (4) y_b = ((x_b · W_downᵀ + b_down) · T_b) · W_upᵀ + b_up            [N, C]   channel mode
        y_b = T_b · x_b                                                  [N, C]   token mode
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError
from fastadapt.kernels import cluster_attention
from fastadapt.layers.dropout import Dropout

MODES = ("channel", "token")


class ClusterAttention(nn.Module):
    """Apply to every sample's tokens its own mixture of learned transforms.

    The mean token is compared with ``num_centers`` cluster centers; the softmax of the cosines
    mixes as many transforms, which act on the channels (between a projection down to ``rank``
    and one up again) or on the tokens.

    Args:
        dim: channels C of the tokens.
        num_centers: cluster centers K.
        rank: width R of the transforms in channel mode (upstream: ``temp_dim``); unused in
            token mode.
        mode: ``"channel"`` or ``"token"``.
        num_tokens: N, fixed; needed in token mode only.
        proj_drop: dropout on the output.

    Shape:
        [B, N, C] to [B, N, C].

    Raises:
        ValueError: a size is not positive, or token mode has no ``num_tokens``.

    Source: CLAdapter (Li et al. 2025), section 3; upstream ``Cluster_Attention``.
    """

    def __init__(
        self,
        dim: int,
        num_centers: int = 20,
        rank: int = 256,
        mode: Literal["channel", "token"] = "channel",
        num_tokens: int | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}; expected 'channel' or 'token'")
        if mode == "token" and num_tokens is None:
            raise InputError("mode='token' needs num_tokens: its transforms are [N, N]")
        sizes = {"dim": dim, "num_centers": num_centers, "rank": rank, "num_tokens": num_tokens}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise InputError(f"{name} is {size}; expected a positive number")
        self.dim = dim
        self.num_centers = num_centers
        self.mode = mode
        self.rank = rank if mode == "channel" else None
        self.num_tokens = num_tokens if mode == "token" else None

        width = rank if num_tokens is None or mode == "channel" else num_tokens
        self.centers = nn.Parameter(torch.empty(dim, num_centers))
        self.transforms = nn.Parameter(torch.empty(num_centers, width, width))
        self.down = nn.Linear(dim, rank) if mode == "channel" else None
        self.up = nn.Linear(rank, dim) if mode == "channel" else None
        self.proj_drop = Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw centers and transforms standard normal, projections as PyTorch (upstream) does."""
        nn.init.normal_(self.centers)
        nn.init.normal_(self.transforms)
        if self.down is not None and self.up is not None:
            self.down.reset_parameters()
            self.up.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        if self.down is None or self.up is None:  # token mode
            if x.dim() == 3 and x.shape[1] != self.num_tokens:
                raise InputError(
                    f"x has {x.shape[1]} tokens; this token-mode layer was made for "
                    f"{self.num_tokens}. Use mode='channel' for inputs of several sizes."
                )
            return self.proj_drop(cluster_attention(x, self.centers, self.transforms))
        y = cluster_attention(
            x,
            self.centers,
            self.transforms,
            self.down.weight,
            self.down.bias,
            self.up.weight,
            self.up.bias,
        )
        return self.proj_drop(y)

    def extra_repr(self) -> str:
        """Describe the sizes for ``repr``."""
        size = f"rank={self.rank}" if self.mode == "channel" else f"num_tokens={self.num_tokens}"
        return f"dim={self.dim}, num_centers={self.num_centers}, {size}, mode={self.mode}"
