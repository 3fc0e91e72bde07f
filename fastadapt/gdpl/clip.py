"""Run the two branches of an open_clip model with prompts and low-rank updates.

The blocks' modules are used as they are; the loop around them and the attention's projections are
reimplemented, always batch first. Layer l, on x [B, N, D] and n prompt tokens p_l [B, n, D]:

    (1) x[:, −n:] = p_l                              [B, n, D]   for 1 ≤ l < depth
    (2) q, k, v   = x · (W_in + b_in · a_in)ᵀ + bias [B, N, D]   each
    (3) y         = softmax(q · kᵀ / sqrt(d) + mask) · v
    (4) x         = x + y · (W_out + b_out · a_out)ᵀ + bias
    (5) x         = x + mlp(LayerNorm(x))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastadapt.backbones import embed_clip_patches
from fastadapt.errors import InputError
from fastadapt.gdpl.low_rank import LowRankUpdate


def text_tower(clip: nn.Module) -> nn.Module:
    """Return the module that holds the text branch: the model itself, or its ``text``."""
    return getattr(clip, "text", clip)


def vision_width(clip: nn.Module) -> int:
    """Return the width of the vision branch."""
    return clip.visual.class_embedding.shape[-1]


def text_width(clip: nn.Module) -> int:
    """Return the width of the text branch."""
    return text_tower(clip).positional_embedding.shape[-1]


def num_layers(clip: nn.Module) -> int:
    """Return the number of layers of the shallower branch."""
    return min(len(t.transformer.resblocks) for t in (clip.visual, text_tower(clip)))


def check_clip(clip: nn.Module) -> None:
    """Check that a model is an open_clip model with two plain transformers.

    Raises:
        InputError: it is not; the part that differs is named.
    """
    name = type(clip).__name__
    remedy = "expected an open_clip ViT, as open_clip.create_model('ViT-B-16') makes one"
    if not hasattr(clip, "visual") or not hasattr(clip, "logit_scale"):
        raise InputError(f"clip is a {name} without image and text branches; {remedy}")
    text = text_tower(clip)
    for branch, tower in (("vision", clip.visual), ("text", text)):
        blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
        if blocks is None:
            raise InputError(
                f"the {branch} branch of {name} is a {type(tower).__name__}, not open_clip's own "
                f"transformer: there are no layers to prompt; {remedy}"
            )
        attention = getattr(blocks[0], "attn", None)
        if getattr(attention, "in_proj_weight", None) is None:
            raise InputError(
                f"the {branch} branch of {name} has {type(attention).__name__} layers; expected "
                "nn.MultiheadAttention with one in_proj_weight"
            )
    if getattr(text, "attn_mask", None) is None or getattr(text, "cls_emb", None) is not None:
        raise InputError(
            f"the text branch of {name} is not purely causal: GDPL reads its features at the end "
            "token of causal attention"
        )
    if pool_type(clip) not in ("argmax", "eos"):
        raise InputError(
            f"the text branch of {name} pools by {pool_type(clip)!r}; expected its end token"
        )


def pool_type(clip: nn.Module) -> str:
    """Return how the text branch finds its feature: ``argmax`` (the highest token) or ``eos``."""
    return str(getattr(clip, "text_pool_type", None) or getattr(clip.text, "pool_type", ""))


def activation(clip: nn.Module) -> str:
    """Return the name of the activation in the MLPs: ``GELU``, or ``QuickGELU`` (OpenAI's)."""
    blocks: Any = clip.visual.transformer.resblocks  # type: ignore[union-attr]
    return type(blocks[0].mlp.gelu).__name__


def encode_image(
    visual: nn.Module,
    images: Tensor,
    prompt: Tensor,
    deep_prompts: Tensor,
    updates: Sequence[LowRankUpdate],
    grad_checkpointing: bool = False,
) -> Tensor:
    """Encode images [B, 3, H, W] as features [B, embed_dim], not normalised.

    Args:
        visual: open_clip's ``VisionTransformer``.
        prompt: [1, n, D], after the image's tokens in the first layer.
        deep_prompts: [depth − 1, B, n, D], which replace it in the following layers.
        updates: of the first layers' attention.
    """
    x = embed_clip_patches(visual, images.to(visual.conv1.weight.dtype))
    prompt = visual.ln_pre(prompt.to(x.dtype)).expand(x.shape[0], -1, -1)
    x = torch.cat([x, prompt], dim=1)
    x = run_blocks(visual.transformer.resblocks, x, deep_prompts, updates, None, grad_checkpointing)
    # open_clip has no public function for the pooling that the tower is configured with.
    pooled, _ = visual._pool(x[:, : -prompt.shape[1]])
    return pooled if visual.proj is None else pooled @ visual.proj


def project_text(text: nn.Module, x: Tensor) -> Tensor:
    """Project text tokens [..., D] to features [..., embed_dim]."""
    x = text.ln_final(x)
    projection = text.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection


def run_blocks(
    blocks: Sequence[nn.Module],
    x: Tensor,
    deep_prompts: Tensor,
    updates: Sequence[LowRankUpdate],
    mask: Tensor | None,
    grad_checkpointing: bool = False,
) -> Tensor:
    """Run transformer layers with prompts that are replaced layer by layer.

    Args:
        blocks: open_clip's ``ResidualAttentionBlock``, one per layer.
        x: [B, N + n, D]; the last n tokens are the prompts.
        deep_prompts: [depth − 1, B or 1, n, D], for the layers after the first.
        updates: one per layer, from the first on; later layers have none.
        mask: additive [N + n, N + n], or ``None``.
        grad_checkpointing: keep the layers' inputs alone and compute them again in the backward
            pass.
    """
    # Cast for all layers at once, and so are their gradients. x.shape[0] and not len(x), which
    # would fix the batch size in an exported graph.
    prompts = deep_prompts.to(x.dtype).expand(-1, x.shape[0], -1, -1).unbind(0)
    for index, block in enumerate(blocks):
        if 1 <= index <= len(prompts):
            prompt = prompts[index - 1]
            x = torch.cat([x[:, : -prompt.shape[1]], prompt], dim=1)
        update = updates[index] if index < len(updates) else None
        if grad_checkpointing and torch.is_grad_enabled():
            # The frozen layers draw no random numbers, and a CUDA graph could not save their state.
            x = checkpoint(
                run_block, block, x, update, mask, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x = run_block(block, x, update, mask)
    return x


def run_block(
    block: nn.Module, x: Tensor, update: LowRankUpdate | None, mask: Tensor | None
) -> Tensor:
    """Run one layer, [B, N, D] to [B, N, D]."""
    x = x + block.ls_1(attention(block.attn, block.ln_1(x), update, mask))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def attention(
    attn: nn.MultiheadAttention, x: Tensor, update: LowRankUpdate | None, mask: Tensor | None
) -> Tensor:
    """Apply self-attention with updated projections, [B, N, D] to [B, N, D]."""
    in_a, in_b, out_a, out_b = update or (None,) * 4
    qkv = low_rank_linear(x, attn.in_proj_weight, attn.in_proj_bias, in_a, in_b)
    # Split like this, the gradients are concatenated again without another copy.
    parts = (part.unflatten(-1, (attn.num_heads, -1)) for part in qkv.chunk(3, dim=-1))
    q, k, v = (part.transpose(1, 2) for part in parts)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = y.transpose(1, 2).flatten(2)
    return low_rank_linear(y, attn.out_proj.weight, attn.out_proj.bias, out_a, out_b)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> Tensor:
    """Return ``x (W + b a)ᵀ + bias`` for x [..., in]; a and b have the dtype of the computation.

    The update is not added to the weight: then no gradient of the weight's size is computed.
    """
    if a is None or b is None:
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    y = F.linear(rows, weight, bias)
    # addmm_ accumulates in place: the sum needs no kernel and no tensor of its own.
    y = y.addmm_(F.linear(rows, a), b.t())
    return y.unflatten(0, x.shape[:-1])
