"""Compute transformer and ConvNeXt blocks in half precision, without gradients.

For a transformer's tokens x [B, N, C] (rows of a batch, M = B · N) from Hopper on:

    (1)  n = LayerNorm(x)                       [B, N, C]    one kernel, which reads and writes once
    (2)  p = n · Wqkvᵀ + bqkv                   [B, N, 3·C]  q, k and v, which stay where they are
    (3)  a = attention(p)                       [B, N, C]    one kernel: ours, or PyTorch's
    (4)  x = x + a · (g ⊙ Wo)ᵀ + g ⊙ bo         [B, N, C]    sum and layer scale g in the product
    (5)  n = LayerNorm(x)                       [B, N, C]
    (6)  u = gelu(n · W1ᵀ + b1)                 [B, N, 4·C]  GELU in the product, in the tanh form
    (7)  x = x + u · (g ⊙ W2)ᵀ + g ⊙ b2         [B, N, C]

and for a ConvNeXt's map x [B, H, W, C]:

    (8)  n = (depthwise(x) − mean) · rstd       [B, H, W, C] one kernel
    (9)  u = gelu(n · (W1 ⊙ w)ᵀ + b1 + W1 · b)  [B, H, W, 4·C]  the norm's w and b in the product
    (10) x = x + u · (g ⊙ W2)ᵀ + g ⊙ b2         [B, H, W, C]    (9) and (10) in one kernel for few C

The residual stream x keeps the dtype that it has without fusion, mostly fp32; n, p, a and u are in
half precision. Products are cuBLASLt's (:mod:`fastadapt.kernels.linear_epilogue`). Where it was not
measured, sums are computed in the norms' kernels and GELU is exact: (4) and (5), (7) and the next
(1) become a product and one kernel for sum and norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.fusion import layer_weights
from fastadapt.fusion.kernel_choices import Choices, default_choices
from fastadapt.kernels.depthwise_norm.checks import SIZE
from fastadapt.kernels.depthwise_norm.op import depthwise_norm
from fastadapt.kernels.layer_norm.op import add_layer_norm, layer_norm
from fastadapt.kernels.linear_epilogue.op import epilogues_are_fast, linear_epilogue
from fastadapt.kernels.narrow_mlp.checks import WIDEST
from fastadapt.kernels.narrow_mlp.op import narrow_mlp
from fastadapt.kernels.patch_embedding.op import patch_embedding
from fastadapt.kernels.qkv_attention.op import qkv_attention
from fastadapt.kernels.residual_mlp.op import linear_gelu
from fastadapt.kernels.shifted_norm.op import shifted_norm


class Norm(NamedTuple):
    """A LayerNorm's parameters, in their own dtype."""

    weight: Tensor
    bias: Tensor
    eps: float


class Linear(NamedTuple):
    """A linear layer's parameters, multiplied by the layer scale after it.

    Attributes:
        weight: [N, C] in half precision.
        bias: [N] in half precision.
        wide_bias: [N] in fp32, for sums in fp32.
    """

    weight: Tensor
    bias: Tensor
    wide_bias: Tensor


class TransformerBlock(NamedTuple):
    """The parts of one transformer block, in the order of the computation.

    Attributes:
        heads: of attention.
        scale: of the products of queries and keys; ``None``: PyTorch's.
    """

    norm1: Norm
    qkv: Linear
    heads: int
    scale: float | None
    proj: Linear
    norm2: Norm
    fc1: Linear
    fc2: Linear


class TransformerBlocks:
    """Run all blocks of one of timm's vision transformers in sequence, without gradients.

    Args:
        blocks: an nn.Sequential of timm's ``Block``.
        dtype: of the products, bf16 or fp16; weights of another dtype are copied.
    """

    def __init__(self, blocks: nn.Sequential, dtype: torch.dtype):
        self.dtype = dtype
        self.scale = getattr(blocks[0].ls1, "gamma", None)
        self.blocks = [transformer_block(block, dtype) for block in blocks]

    def __call__(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, C] to tokens [B, N, C]."""
        choices = default_choices(x.shape[0] * x.shape[1], self.dtype, x.device)
        stream = ResidualStream(stream_dtype(x, self.scale), self.dtype)
        for block in self.blocks:
            qkv = stream.linear(stream.norm(block.norm1), block.qkv)
            stream.add(attend(qkv, block, choices), block.proj)
            stream.add(stream.hidden(stream.norm(block.norm2), block.fc1), block.fc2)
        return stream.whole()


class ResidualStream:
    """The sum that blocks add their branches to, on the way through a backbone.

    Args:
        x: [..., C], which is not written to.
        dtype: of the products.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype):
        self.dtype = dtype
        self.in_products = sums_in_products(x, dtype)
        self.x = x.contiguous() if self.in_products else x
        self.is_own = False  # whether x may be written to
        self.branch: Tensor | None = None  # what x still lacks

    def norm(self, norm: Norm) -> Tensor:
        """Return the LayerNorm of the sum, in the products' dtype."""
        if self.branch is None:
            return layer_norm(self.x, *norm, dtype=self.dtype)
        self.x, normal = add_layer_norm(self.x, self.branch, *norm, self.dtype)
        self.branch = None
        return normal

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        """Return a linear layer's result."""
        if not self.in_products:
            return F.linear(x, layer.weight, layer.bias)
        y = linear_epilogue(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias)
        return y.view(*x.shape[:-1], -1)

    def hidden(self, x: Tensor, layer: Linear) -> Tensor:
        """Return GELU of a linear layer's result."""
        if not self.in_products:
            return linear_gelu(x, layer.weight, layer.bias)
        y = linear_epilogue(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, gelu=True)
        return y.view(*x.shape[:-1], -1)

    def add(self, x: Tensor, layer: Linear) -> None:
        """Add a linear layer's result to the sum."""
        if not self.in_products:
            self.branch = F.linear(x, layer.weight, layer.bias)
            return
        y = linear_epilogue(
            x.reshape(-1, x.shape[-1]),
            layer.weight,
            layer.wide_bias if self.x.dtype == torch.float32 else layer.bias,
            residual=self.x.view(-1, self.x.shape[-1]),
            in_place=self.is_own,
        )
        self.x, self.is_own = y.view(self.x.shape), True

    def whole(self) -> Tensor:
        """Return the sum."""
        return self.x if self.branch is None else self.x + self.branch


def sums_in_products(x: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether products in ``dtype`` add to x in their epilogue, and compute GELU there."""
    return x.dtype in (dtype, torch.float32) and x.numel() > 0 and epilogues_are_fast(x)


def attend(qkv: Tensor, block: TransformerBlock, choices: Choices) -> Tensor:
    """Compute self-attention of q, k and v [B, N, 3·C]; the result is [B, N, C]."""
    backend = "reference" if choices.attention == "library" else "auto"
    return qkv_attention(qkv, block.heads, scale=block.scale, backend=backend)


class ConvNeXtBlock:
    """Run one of timm's ConvNeXt blocks without gradients.

    Args:
        block: timm's ``ConvNeXtBlock``.
        dtype: of the products, bf16 or fp16; weights of another dtype are copied.
    """

    def __init__(self, block: Any, dtype: torch.dtype):
        self.dtype = dtype
        self.scale = block.gamma
        self.eps = block.norm.eps
        self.conv = block.conv_dw
        self.taps: Tensor | None = None
        if self.conv.kernel_size == (SIZE, SIZE) and self.conv.dilation == (1, 1):
            self.taps = layer_weights.rounded(self.conv.weight.flatten(1).t(), dtype)
        self.fc1 = linear(block.mlp.fc1, dtype, norm=block.norm)
        self.fc2 = linear(block.mlp.fc2, dtype, block.gamma)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H, W]."""
        x = stream_dtype(x, self.scale).permute(0, 2, 3, 1).contiguous()
        normal = self._normal(x)
        rows, channels = normal.numel() // normal.shape[-1], normal.shape[-1]
        choices = default_choices(rows, self.dtype, x.device)
        if choices.narrow and channels <= WIDEST:
            layers = (self.fc1.weight, self.fc1.wide_bias, self.fc2.weight, self.fc2.wide_bias)
            normal, sums = (t.view(rows, channels) for t in (normal, x))
            y = narrow_mlp(normal, *layers, sums, approximate=choices.gelu)
            x = y.view(x.shape)
        else:
            stream = ResidualStream(x, self.dtype)
            stream.add(stream.hidden(normal, self.fc1), self.fc2)
            x = stream.whole()
        return x.permute(0, 3, 1, 2)

    def _normal(self, x: Tensor) -> Tensor:
        """Convolve and normalize [B, H, W, C]."""
        if self.taps is not None:
            return depthwise_norm(x, self.taps, self.conv.bias, self.eps, dtype=self.dtype)
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return shifted_norm(y.contiguous(), None, self.eps)


class PatchConvolution:
    """Run a network's first convolution, of patches that do not overlap, as one product.

    cuDNN takes channels by eights, and pads an image's three: for 256 images of ViT-B/16 that and
    the convolution take 2.0 ms on an H100, rounding the images and this product 0.3.

    Args:
        conv: for which :func:`is_first_of_patches` is true.
        dtype: of the product, bf16 or fp16.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        self.conv, self.dtype = conv, dtype
        self.patch = int(conv.stride[0])
        rows = layer_weights.filters_as_rows(conv)
        self.weight, self.bias = layer_weights.rounded(rows.weight, dtype), rows.vectors

    def __call__(self, x: Tensor) -> Tensor:
        """Map images [B, D, H, W] to [B, C, H / P, W / P]."""
        sides = [size // self.patch for size in x.shape[-2:]]
        whole = x.dim() == 4 and tuple(x.shape[-2:]) == tuple(n * self.patch for n in sides)
        if not whole or not sums_in_products(x, self.dtype):
            return nn.Conv2d.forward(self.conv, x)
        last = x.permute(0, 2, 3, 1).to(self.dtype, memory_format=torch.contiguous_format)
        y = patch_embedding(last, self.weight, self.bias, self.patch)
        return y.unflatten(1, sides).permute(0, 3, 1, 2)


def is_first_of_patches(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Tell whether a module is a convolution of images' patches that do not overlap."""
    return layer_weights.is_of_patches(conv) and conv.in_channels % 8 != 0 and conv.bias is not None


class NormAndConvolution:
    """Run ConvNeXt's stem (a convolution, a norm) or downsampling (a norm, a convolution).

    Args:
        layers: an nn.Sequential of timm's ``LayerNorm2d`` and an nn.Conv2d, in either order.
        dtype: of the convolution's operands under autocast.
    """

    def __init__(self, layers: nn.Sequential, dtype: torch.dtype):
        first, self.last = layers
        # A convolution rounds its input: the norm before it may write what is rounded already.
        self.dtype = None if isinstance(first, nn.Conv2d) else dtype
        self.first = PatchConvolution(first, dtype) if is_first_of_patches(first) else first

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H', W']."""
        return self._run(self.last, self._run(self.first, x))

    def _run(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not isinstance(layer, nn.LayerNorm):
            return layer(x)
        y = layer_norm(x.permute(0, 2, 3, 1), *_norm(layer), dtype=self.dtype)
        return y.permute(0, 3, 1, 2)


def stream_dtype(x: Tensor, scale: Tensor | None) -> Tensor:
    """Cast x to the dtype that it has once a layer scale's result is added."""
    return x if scale is None else x.to(torch.promote_types(x.dtype, scale.dtype))


def transformer_block(block: Any, dtype: torch.dtype) -> TransformerBlock:
    """Return the parts of one of timm's blocks."""
    attn = block.attn
    return TransformerBlock(
        norm1=_norm(block.norm1),
        qkv=linear(attn.qkv, dtype),
        heads=attn.num_heads,
        scale=None if attn.fused_attn else float(attn.scale),
        proj=linear(attn.proj, dtype, getattr(block.ls1, "gamma", None)),
        norm2=_norm(block.norm2),
        fc1=linear(block.mlp.fc1, dtype),
        fc2=linear(block.mlp.fc2, dtype, getattr(block.ls2, "gamma", None)),
    )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)


def linear(
    layer: nn.Linear,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
) -> Linear:
    """Return a layer's parameters with the layer scale after it, or the norm before it, inside.

    They are the layer's own where nothing is to be changed.
    """
    found = layer_weights.Linear(layer.weight.detach(), layer.bias.detach())
    if scale is not None or norm is not None:
        found = layer_weights.linear(layer, scale)
    if norm is not None:
        found = layer_weights.after_norm(found, norm)
    return Linear(found.weight.to(dtype), found.bias.to(dtype), found.bias.float())
