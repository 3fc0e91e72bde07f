"""CLAdapter: cluster-attention blocks between a frozen backbone and its head."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.kernels import layer_norm, layer_norm_mean, layer_norm_twice, residual_mlp
from fastadapt.kernels.common.dispatch import compute_dtype, is_exporting, why_not_device
from fastadapt.layers.cluster_attention import ClusterAttention
from fastadapt.layers.plain import has_global_hooks, is_plain


class Mlp(nn.Module):
    """Two linear layers with exact GELU between; [..., C] to [..., C]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _can_fuse(x: Tensor, *parts: tuple[nn.Module, type[nn.Module]]) -> bool:
    """Whether an operation of ours may stand for modules: nothing then passes by unseen.

    Not where one was replaced (quantised, adapted, parametrised, folded), has hooks or another
    ``forward``, or lacks a parameter; nor in an exported program, which holds PyTorch's operators.
    """
    if is_exporting() or why_not_device(x) is not None:
        return False
    if has_global_hooks():
        return False
    return all(type(part) is kind and is_plain(part) for part, kind in parts)


def _can_fuse_norms(x: Tensor, *norms: nn.LayerNorm) -> bool:
    # A compiler makes them part of what stands around them.
    return not torch.compiler.is_compiling() and _can_fuse(x, *((n, nn.LayerNorm) for n in norms))


def _normalise(norm: nn.LayerNorm, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``norm(x)``, in ``dtype`` if the fused operation can stand for the module."""
    if _can_fuse_norms(x, norm):
        return layer_norm(x, norm.weight, norm.bias, norm.eps, dtype=dtype)
    return norm(x)


class CLAdapterBlock(nn.Module):
    """One block: cluster attention, then a residual MLP; [B, N, C] to [B, N, C].

    There is no residual around the attention: upstream has none, and its checkpoints depend on it.
    On GPUs one operation each stands for ``ln_1`` and for ``ln_2``, ``mlp`` and the sum, as long as
    these modules are what they were made as, without hooks.
    """

    def __init__(self, dim: int, mlp_ratio: float, **attention):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = ClusterAttention(dim, **attention)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        return self._behind_ln_1(_normalise(self.ln_1, x, self._ln_1_dtype(x)))

    def forward_behind(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """``self(norm(x))``; on GPUs that norm and ``ln_1`` are one operation, too."""
        ln_1 = self.ln_1
        if not (type(self) is CLAdapterBlock and is_plain(self) and _can_fuse_norms(x, norm, ln_1)):
            return self(_normalise(norm, x))
        parameters = (norm.weight, norm.bias, ln_1.weight, ln_1.bias)
        dtype = self._ln_1_dtype(x)
        return self._behind_ln_1(layer_norm_twice(x, *parameters, norm.eps, ln_1.eps, dtype=dtype))

    def _ln_1_dtype(self, x: Tensor) -> torch.dtype | None:
        # Cluster attention rounds to autocast's dtype itself; so the norm need not write fp32.
        rounds = type(self.attn) is ClusterAttention and is_plain(self.attn)
        return compute_dtype(x) if rounds else None

    def _behind_ln_1(self, x: Tensor) -> Tensor:
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
    """The whole adapter: LayerNorm, ``depth`` blocks, LayerNorm (upstream's ``post``).

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
            raise ValueError(f"depth is {depth}; expected at least 1 block")
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio is {mlp_ratio}; dim {dim} × mlp_ratio must be at least 1")
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
        """Draws every parameter anew, as at construction."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        y = _normalise(self.norm2, self._through_blocks(self._tokens(x)))
        if x.dim() == 3:
            return y
        if self.channels_last:
            return y.unflatten(1, x.shape[1:-1])
        return y.transpose(1, 2).unflatten(2, x.shape[2:])

    def forward_pooled(self, x: Tensor) -> Tensor:
        """The mean over all positions of ``self(x)``, [B, dim].

        On GPUs the last norm and the mean are one operation.
        """
        x, norm = self._through_blocks(self._tokens(x)), self.norm2
        if _can_fuse_norms(x, norm):
            return layer_norm_mean(x, norm.weight, norm.bias, norm.eps)
        return norm(x).mean(1)

    def _through_blocks(self, x: Tensor) -> Tensor:
        first, *others = self.blocks
        x = first.forward_behind(self.norm1, x)
        for block in others:
            x = block(x)
        return x

    def _tokens(self, x: Tensor) -> Tensor:
        """The input as [B, N, C]."""
        if x.dim() not in (3, 4, 5):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected tokens [B, N, C], a map [B, C, H, W] "
                "or a volume [B, C, D, H, W]"
            )
        channel = -1 if x.dim() == 3 or self.channels_last else 1
        if x.shape[channel] != self.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)} with {x.shape[channel]} channels in dimension "
                f"{channel}; this adapter has dim={self.dim}"
            )
        if x.dim() == 3:
            return x
        return x.flatten(1, -2) if self.channels_last else x.flatten(2).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, channels_last={self.channels_last}"
