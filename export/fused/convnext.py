"""The steps of timm's ConvNeXt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.fusion import layer_weights as layers
from fastadapt.fusion.frozen_blocks import why_not_fused
from fastadapt.kernels.patch_embedding.checks import WIDEST_NORM

from .steps import ConvNextBlock, Downsample, Patches, Step, Tokens


def why_not(backbone: Any) -> str | None:
    """Say why a ConvNeXt has no steps; ``None`` if it has."""
    stem = backbone.stem
    if len(stem) != 2 or not layers.is_of_patches(stem[0]) or not isinstance(stem[1], nn.LayerNorm):
        return "its stem is no convolution of patches with a norm"
    if stem[0].out_channels > WIDEST_NORM:
        return f"its stem has more than {WIDEST_NORM} channels"
    if type(backbone.norm_pre) is not nn.Identity:
        return f"its norm_pre is a {type(backbone.norm_pre).__name__}"
    for stage in backbone.stages:
        down = stage.downsample
        if type(down) is not nn.Identity and not (
            len(down) == 2 and isinstance(down[0], nn.LayerNorm) and layers.is_of_patches(down[1])
        ):
            return "a stage begins with other layers than a norm and a convolution of patches"
        for block in stage.blocks:
            reason = why_not_fused(block)
            conv = block.conv_dw
            if reason is None and (conv.kernel_size != (7, 7) or conv.dilation != (1, 1)):
                reason = f"the filter is {conv.kernel_size[0]} × {conv.kernel_size[1]}"
            if reason is not None:
                return f"of its blocks {reason}"
    return None


def steps_of(backbone: Any, mean: Tensor, std: Tensor, dtype: torch.dtype) -> list[Step]:
    """Return the steps from uint8 images to a map; arguments as for vision transformers."""
    conv, norm = backbone.stem
    stem = layers.for_bytes(layers.filters_as_rows(conv), mean, std)
    found: list[Step] = [
        Patches(
            patch=conv.stride[0],
            grid=1,
            eps=norm.eps,
            weight=layers.rounded(stem.weight, dtype),
            table=stem.vectors,
            norm_weight=norm.weight.detach().float(),
            norm_bias=norm.bias.detach().float(),
        )
    ]
    for stage in backbone.stages:
        if type(stage.downsample) is not nn.Identity:
            before, strided = stage.downsample
            found.append(_downsample(before, strided, dtype))
        found += [_block(block, dtype) for block in stage.blocks]
    return found


def _downsample(norm: nn.LayerNorm, conv: nn.Conv2d, dtype: torch.dtype) -> Downsample:
    patch = conv.stride[0]
    layer = layers.after_norm(layers.filters_as_rows(conv), norm, patch * patch)
    return Downsample(patch, norm.eps, layers.rounded(layer.weight, dtype), layer.vectors)


def _block(block: Any, dtype: torch.dtype) -> ConvNextBlock:
    conv = block.conv_dw
    fc1 = layers.after_norm(layers.linear(block.mlp.fc1), block.norm)
    fc2 = layers.linear(block.mlp.fc2, block.gamma)
    return ConvNextBlock(
        eps=block.norm.eps,
        conv_weight=layers.rounded(conv.weight.flatten(1).t(), dtype),
        conv_bias=conv.bias.detach().float(),
        fc1_weight=layers.rounded(fc1.weight, dtype),
        fc1_bias=fc1.vectors,
        fc2_weight=layers.rounded(fc2.weight, dtype),
        fc2_bias=fc2.vectors,
    )


def tokens_step() -> Tokens:
    """Return the step from a map to tokens."""
    return Tokens(0, 0, 0.0)
