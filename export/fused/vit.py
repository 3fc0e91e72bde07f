"""The steps of timm's vision transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.fusion import layer_weights as layers
from fastadapt.fusion.frozen_blocks import why_not_fused

from .steps import Patches, Step, Tokens, TransformerBlock


def why_not(backbone: Any) -> str | None:
    """Say why a vision transformer has no steps; ``None`` if it has."""
    from timm import layers as timm_layers

    embed = backbone.patch_embed
    if type(embed) is not timm_layers.PatchEmbed or type(embed.proj) is not nn.Conv2d:
        return f"its patch embedding is a {type(embed).__name__}"
    if not layers.is_of_patches(embed.proj) or embed.dynamic_img_pad:
        return "its patches overlap or are padded"
    if type(embed.norm) is not nn.Identity:
        return "its patches are normalised"
    if backbone.pos_embed is None:
        return "it has no position embedding"
    for name in ("norm_pre", "patch_drop"):
        if type(getattr(backbone, name)) is not nn.Identity:
            return f"its {name} is a {type(getattr(backbone, name)).__name__}"
    if not isinstance(backbone.norm, nn.LayerNorm | nn.Identity):
        return f"its norm is a {type(backbone.norm).__name__}"
    reason = why_not_fused(backbone.blocks)
    return None if reason is None else f"of its blocks {reason}"


def steps_of(
    backbone: Any, mean: Tensor, std: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> list[Step]:
    """Return the steps from uint8 images to tokens, prefix tokens included.

    Args:
        backbone: for which :func:`why_not` has no reason.
        mean, std: of the normalisation, [3].
        size: height and width of the images.
        dtype: of the weights.
    """
    conv = backbone.patch_embed.proj
    grid = (size[0] // conv.stride[0], size[1] // conv.stride[0])
    patches = layers.for_bytes(layers.filters_as_rows(conv), mean, std)
    found: list[Step] = [
        Patches(
            patch=conv.stride[0],
            grid=0,
            eps=0.0,
            weight=layers.rounded(patches.weight, dtype),
            table=_table(backbone, patches.bias, grid),
        )
    ]
    found += [_block(block, dtype) for block in backbone.blocks]
    return found


def _table(backbone: Any, bias: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return what every token begins with, [N, C] fp32: position, bias, prefix tokens.

    A model for images of any size fits its position embedding to theirs, as here to one.
    """
    from timm.layers import resample_abs_pos_embed

    position = backbone.pos_embed.detach()
    if backbone.dynamic_img_size:
        position = resample_abs_pos_embed(
            position,
            new_size=list(grid),
            old_size=list(backbone.patch_embed.grid_size),
            num_prefix_tokens=0 if backbone.no_embed_class else backbone.num_prefix_tokens,
        )
    prefix = [getattr(backbone, name, None) for name in ("cls_token", "reg_token")]
    tokens = [t.detach().double()[0] for t in prefix if t is not None]
    position = position.double()[0]
    count = sum(len(t) for t in tokens)
    if backbone.no_embed_class:
        return torch.cat([*tokens, position + bias]).float()
    table = position.clone()
    table[count:] += bias
    if tokens:
        table[:count] += torch.cat(tokens)
    return table.float()


def _block(block: Any, dtype: torch.dtype) -> TransformerBlock:
    attn, mlp = block.attn, block.mlp
    qkv = layers.after_norm(layers.linear(attn.qkv), block.norm1)
    fc1 = layers.after_norm(layers.linear(mlp.fc1), block.norm2)
    proj = layers.linear(attn.proj, getattr(block.ls1, "gamma", None))
    fc2 = layers.linear(mlp.fc2, getattr(block.ls2, "gamma", None))
    return TransformerBlock(
        heads=attn.num_heads,
        scale=float(attn.scale),
        eps1=block.norm1.eps,
        eps2=block.norm2.eps,
        qkv_weight=layers.rounded(qkv.weight, dtype),
        qkv_bias=qkv.vectors,
        proj_weight=layers.rounded(proj.weight, dtype),
        proj_bias=proj.vectors,
        fc1_weight=layers.rounded(fc1.weight, dtype),
        fc1_bias=fc1.vectors,
        fc2_weight=layers.rounded(fc2.weight, dtype),
        fc2_bias=fc2.vectors,
    )


def tokens_step(backbone: Any, prefix: int, class_token: bool) -> Tokens:
    """Return the norm after the blocks, of the tokens that the adapter gets."""
    norm = backbone.norm
    first, last = (0, 1) if class_token else (prefix, 0)
    if type(norm) is nn.Identity:
        return Tokens(first, last, 0.0)
    return Tokens(first, last, norm.eps, norm.weight.detach().float(), norm.bias.detach().float())
