"""Adapt the features of a frozen backbone by blocks of cluster attention (CLAdapter).

With x [B, N, C] and D blocks:

    (1) x = LayerNorm(x)                                        [B, N, C]   norm1
    (2) x = cluster_attention(LayerNorm(x))                     [B, N, C]   no residual
    (3) x = x + W2 · gelu(W1 · LayerNorm(x) + b1) + b2          [B, N, C]   hidden mlp_ratio·C
    (4) y = LayerNorm(x)                                        [B, N, C]   norm2

where (2) and (3) run D times. On a GPU norm1 and the first LayerNorm of (2), all of (3), and norm2
with the mean over tokens are one operation each.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.errors import InputError
from fastadapt.kernels import layer_norm, layer_norm_mean, layer_norm_twice, residual_mlp
from fastadapt.kernels.common.dispatch import compute_dtype, is_exporting, why_not_device
from fastadapt.layers.cluster_attention import ClusterAttention
from fastadapt.layers.unmodified import has_global_hooks, is_unmodified


class Mlp(nn.Module):
    """Apply two linear layers with exact GELU in between, [..., C] to [..., C]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., C] to [..., C]."""
        return self.fc2(F.gelu(self.fc1(x)))


def _can_fuse(x: Tensor, *parts: tuple[nn.Module, type[nn.Module]]) -> bool:
    """Tell whether a fused operation may replace the calls of some modules.

    It may not where one was replaced (quantised, adapted, parametrised, folded), has hooks or
    another ``forward``, or lacks a parameter; nor in an exported program, which holds PyTorch's
    operators.
    """
    if is_exporting() or why_not_device(x) is not None:
        return False
    if has_global_hooks():
        return False
    return all(type(part) is kind and is_unmodified(part) for part, kind in parts)


def _can_fuse_norms(x: Tensor, *norms: nn.LayerNorm) -> bool:
    # A compiler fuses norms with the operations around them.
    return not torch.compiler.is_compiling() and _can_fuse(x, *((n, nn.LayerNorm) for n in norms))


def _normalise(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``norm(x)``, in ``dtype`` where the fused operation replaces the module."""
    if _can_fuse_norms(x, norm):
        return layer_norm(x, norm.weight, norm.bias, norm.eps, dtype=dtype)
    return norm(x)


class CLAdapterBlock(nn.Module):
    """Apply cluster attention, then a residual MLP: equations (2) and (3), [B, N, C] to [B, N, C].

    There is no residual around the attention: upstream has none, and its checkpoints depend on it.
    On GPUs ``ln_1`` is one operation, and ``ln_2``, ``mlp`` and the residual sum are another, as
    long as these modules are unmodified and have no hooks.

    Args:
        dim: channels C.
        mlp_ratio: hidden width of the MLP over ``dim``.
        **attention: for :class:`ClusterAttention`.
    """

    def __init__(self, dim: int, mlp_ratio: float, **attention: Any):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = ClusterAttention(dim, **attention)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        return self._after_ln_1(_normalise(self.ln_1, x, self._ln_1_dtype(x)))

    def forward_normed(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """Return ``self(norm(x))``; on GPUs ``norm`` and ``ln_1`` are one operation."""
        ln_1 = self.ln_1
        plain = type(self) is CLAdapterBlock and is_unmodified(self)
        if not (plain and _can_fuse_norms(x, norm, ln_1)):
            return self(_normalise(norm, x))
        parameters = (norm.weight, norm.bias, ln_1.weight, ln_1.bias)
        dtype = self._ln_1_dtype(x)
        return self._after_ln_1(layer_norm_twice(x, *parameters, norm.eps, ln_1.eps, dtype=dtype))

    def _ln_1_dtype(self, x: Tensor) -> torch.dtype | None:
        # Cluster attention rounds its input to autocast's dtype, so the norm need not write fp32.
        rounds = type(self.attn) is ClusterAttention and is_unmodified(self.attn)
        return compute_dtype(x) if rounds else None

    def _after_ln_1(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        norm, mlp = self.ln_2, self.mlp
        if type(mlp) is not Mlp or not _can_fuse(
            x, (norm, nn.LayerNorm), (mlp, Mlp), (mlp.fc1, nn.Linear), (mlp.fc2, nn.Linear)
        ):
            return x + mlp(norm(x))
        first, second = mlp.fc1, mlp.fc2
        return residual_mlp(
            x,
            norm.weight,
            norm.bias,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            norm.eps,
        )


class CLAdapter(nn.Module):
    """Adapt features by LayerNorm, ``depth`` blocks and LayerNorm (upstream's ``post``).

    Args:
        dim: channels C.
        depth: number of blocks.
        num_centers, rank, mode, num_tokens, proj_drop: as for :class:`ClusterAttention`.
        mlp_ratio: hidden width of the MLP over ``dim``.
        channels_last: maps and volumes come as [B, H, W, C] or [B, D, H, W, C], as from timm's
            Swin; ignored for tokens.

    Shape:
        Tokens [B, N, C], maps [B, C, H, W] or volumes [B, C, D, H, W]; the output has the
        input's layout.

    Raises:
        ValueError: the input has no such layout, or its channels are not ``dim``.

    Source: CLAdapter (Li et al. 2025), section 3; upstream ``Post_vit``.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 1,
        num_centers: int = 20,
        rank: int = 256,
        mlp_ratio: float = 4.0,
        mode: Literal["channel", "token"] = "channel",
        num_tokens: int | None = None,
        proj_drop: float = 0.0,
        channels_last: bool = False,
    ):
        super().__init__()
        if depth < 1:
            raise InputError(f"depth is {depth}; expected at least 1 block")
        if int(dim * mlp_ratio) < 1:
            raise InputError(f"mlp_ratio is {mlp_ratio}; dim {dim} × mlp_ratio must be at least 1")
        self.dim = dim
        self.channels_last = channels_last
        self.norm1 = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(
            CLAdapterBlock(
                dim,
                mlp_ratio,
                num_centers=num_centers,
                rank=rank,
                mode=mode,
                num_tokens=num_tokens,
                proj_drop=proj_drop,
            )
            for _ in range(depth)
        )
        self.norm2 = nn.LayerNorm(dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as at construction."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Adapt tokens, a map or a volume; the output has the input's layout."""
        y = _normalise(self.norm2, self._through_blocks(self._tokens(x)))
        if x.dim() == 3:
            return y
        if self.channels_last:
            return y.unflatten(1, x.shape[1:-1])
        return y.transpose(1, 2).unflatten(2, x.shape[2:])

    def forward_pooled(self, x: Tensor) -> Tensor:
        """Return the mean over all positions of ``self(x)``, [B, dim].

        On GPUs the last norm and the mean are one operation.
        """
        x, norm = self._through_blocks(self._tokens(x)), self.norm2
        if _can_fuse_norms(x, norm):
            return layer_norm_mean(x, norm.weight, norm.bias, norm.eps)
        return norm(x).mean(1)

    def _through_blocks(self, x: Tensor) -> Tensor:
        first, *others = self.blocks
        x = first.forward_normed(self.norm1, x)
        for block in others:
            x = block(x)
        return x

    def _tokens(self, x: Tensor) -> Tensor:
        """Return the input as tokens [B, N, C]."""
        if x.dim() not in (3, 4, 5):
            raise InputError(
                f"x has shape {tuple(x.shape)}; expected tokens [B, N, C], a map [B, C, H, W] "
                "or a volume [B, C, D, H, W]"
            )
        channel = -1 if x.dim() == 3 or self.channels_last else 1
        if x.shape[channel] != self.dim:
            raise InputError(
                f"x has shape {tuple(x.shape)} with {x.shape[channel]} channels in dimension "
                f"{channel}; this adapter has dim={self.dim}"
            )
        if x.dim() == 3:
            return x
        return x.flatten(1, -2) if self.channels_last else x.flatten(2).transpose(1, 2)

    def extra_repr(self) -> str:
        """Describe the sizes for ``repr``."""
        return f"dim={self.dim}, channels_last={self.channels_last}"
