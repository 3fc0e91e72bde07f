"""Layers that exist in folded models only, and the input that layers are tried on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.gdpl.prompts import DomainPromptLearner
from fastadapt.kernels.common.dispatch import accumulate_dtype
from fastadapt.layers import ClusterAttention, QuaternionLinear

PROBE_TOKENS = 16


class GroupedLinear(nn.Module):
    """G linear layers, each with its own input: ``y[g] = x[g] W[g]ᵀ + b[g]``.

    Args:
        weight: [G, out_features, in_features].
        bias: [G, out_features], or ``None``.

    Shape:
        [G, ..., in_features] to [G, ..., out_features].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply every group by its own weight."""
        y = x.flatten(1, -2) @ self.weight.transpose(1, 2)
        y = y if self.bias is None else y + self.bias[:, None]
        return y.unflatten(1, x.shape[1:-1])


class FoldedClusterAttention(nn.Module):
    """Cluster attention for inference, made of ordinary operators.

    The centers are normalised beforehand, and the transforms flattened to [K, R·R] (token mode:
    [K, N·N]), so that mixing them is one product. The weights of the mixture depend on the sample.

    Attributes:
        kernels: mix the transforms by Triton kernels instead, which AOTInductor stores; see
            :mod:`fastadapt.kernels.cluster_attention.aot`.

    Shape:
        [B, N, C] to [B, N, C].
    """

    kernels = False

    def __init__(self, layer: ClusterAttention):
        super().__init__()
        dtype = layer.centers.dtype
        centers = F.normalize(layer.centers.detach().double(), dim=0).to(dtype)
        self.width = layer.transforms.shape[-1]
        self.centers = nn.Parameter(centers, requires_grad=False)
        self.transforms = nn.Parameter(layer.transforms.detach().flatten(1), requires_grad=False)
        self.down = layer.down
        self.up = layer.up

    def forward(self, x: Tensor) -> Tensor:
        """Mix the transforms for every sample, and apply the mixture to its tokens."""
        mixed = self._mixed(x).unflatten(1, (self.width, self.width))
        if self.down is None or self.up is None:
            return mixed @ x
        return self.up(self.down(x) @ mixed)

    def _mixed(self, x: Tensor) -> Tensor:
        if self.kernels:
            from fastadapt.kernels.cluster_attention.aot import mixed_transforms

            sums = x.sum(dim=1, dtype=torch.float32)
            return mixed_transforms(sums, self.centers, self.transforms, x.shape[1])
        wide = accumulate_dtype(x.dtype)
        q = x.mean(dim=1, dtype=wide)
        # F.normalize, whose expansion of the norm would be an operator of its own.
        q = q / torch.linalg.vector_norm(q, dim=-1, keepdim=True).clamp_min(1e-12)
        a = (q @ self.centers.to(wide)).softmax(dim=-1).to(x.dtype)
        return a @ self.transforms

    def extra_repr(self) -> str:
        """Describe the sizes."""
        dim, num_centers = self.centers.shape
        return f"dim={dim}, num_centers={num_centers}, width={self.width}"


def probe_input(layer: nn.Module) -> Tensor:
    """Make a standard normal input in fp64, for a layer that no example reaches."""
    generator = torch.Generator().manual_seed(0)
    shape: tuple[int, ...]
    if isinstance(layer, ClusterAttention):
        shape = (2, layer.num_tokens or PROBE_TOKENS, layer.dim)
    elif isinstance(layer, DomainPromptLearner):
        shape = (PROBE_TOKENS, layer.feature_dim)
    elif isinstance(layer, QuaternionLinear):
        width = layer.in_features // 2 if layer.zero_half else layer.in_features
        shape = (
            (PROBE_TOKENS, width) if layer.groups is None else (layer.groups, PROBE_TOKENS, width)
        )
    else:
        assert isinstance(layer.in_features, int)
        shape = (PROBE_TOKENS, layer.in_features)
    return torch.randn(shape, dtype=torch.float64, generator=generator)
