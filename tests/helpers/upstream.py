"""Restate the papers' layers from their published formulas, as ground truth for ours."""

import torch
from torch import nn

from fastadapt.bench.upstream import cluster_attention


class UpstreamClusterAttention(nn.Module):
    """Compute CLAdapter's channel mode with the tensor [B, K, R, R] that upstream materialises."""

    def __init__(self, dim, centers, rank):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(dim, centers))
        self.tran_ms = nn.Parameter(torch.randn(centers, rank, rank))
        self.down_layer = nn.Linear(dim, rank)
        self.up_layer = nn.Linear(rank, dim)
        self.proj = nn.Linear(dim, dim)  # in every checkpoint, in no forward pass

    def forward(self, x):
        down, up = self.down_layer, self.up_layer
        weights = self.centers, self.tran_ms, down.weight, down.bias, up.weight, up.bias
        return cluster_attention(x, *weights)


class UpstreamBlock(nn.Module):
    def __init__(self, dim, centers, rank, mlp_ratio):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = UpstreamClusterAttention(dim, centers, rank)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(dim, hidden))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(hidden, dim))

    def forward(self, x):
        x = self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class UpstreamStack(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.da_resblocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.da_resblocks:
            x = block(x)
        return x


class UpstreamPost(nn.Module):
    """Apply norm, blocks and norm, as upstream's ``post``."""

    def __init__(self, dim, depth=1, centers=20, rank=256, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.CLAdapter_layers = UpstreamStack(
            [UpstreamBlock(dim, centers, rank, mlp_ratio) for _ in range(depth)]
        )

    def forward(self, x):
        return self.norm2(self.CLAdapter_layers(self.norm1(x)))


class UpstreamModel(nn.Module):
    """Run backbone, ``post`` and head, as upstream trains and saves them."""

    def __init__(self, backbone, dim, classes, prefix_tokens, **post):
        super().__init__()
        self.backbone = backbone
        self.post = UpstreamPost(dim, **post)
        self.head = nn.Linear(dim, classes)
        self.prefix_tokens = prefix_tokens

    def forward(self, x):
        x = self.backbone.forward_features(x)
        x = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x[:, self.prefix_tokens :]
        return self.head(self.post(x).mean(1))


def hamilton(x, r, i, j, k):
    """Compute the Hamilton product ``w ⊗ x``, component by component."""
    x_r, x_i, x_j, x_k = x.chunk(4, dim=-1)
    return torch.cat(
        [
            x_r @ r - x_i @ i - x_j @ j - x_k @ k,
            x_r @ i + x_i @ r - x_j @ k + x_k @ j,
            x_r @ j + x_i @ k + x_j @ r - x_k @ i,
            x_r @ k - x_i @ j + x_j @ i + x_k @ r,
        ],
        dim=-1,
    )


def rotation(x, r, i, j, k, scale=None):
    """Rotate by normalised weights, component by component."""
    n = (r * r + i * i + j * j + k * k + 1e-4).sqrt()
    r, i, j, k = r / n, i / n, j / n, k / n
    s = 1 if scale is None else scale
    x_r, x_i, x_j, x_k = x.chunk(4, dim=-1)

    def row(a, b, c):
        return x_i @ (s * a) + x_j @ (s * b) + x_k @ (s * c)

    return torch.cat(
        [
            torch.zeros_like(x_r @ r),
            row(1 - 2 * (j * j + k * k), 2 * (i * j - r * k), 2 * (i * k + r * j)),
            row(2 * (i * j + r * k), 1 - 2 * (i * i + k * k), 2 * (j * k - r * i)),
            row(2 * (i * k - r * j), 2 * (j * k + r * i), 1 - 2 * (i * i + j * j)),
        ],
        dim=-1,
    )
