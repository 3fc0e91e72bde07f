"""The two branches of an open_clip model, run with prompts and low-rank updates.

The blocks' modules are used as they are; only the loop around them and the attention's
projections are ours, always batch first, whatever the model was made with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastadapt.errors import InputError
from fastadapt.gdpl.low_rank import LowRankUpdate


def text_tower(clip: nn.Module) -> nn.Module:
    """What holds the text branch: open_clip has it inside the model, or as its ``text``."""
    return getattr(clip, "text", clip)


def vision_width(clip: nn.Module) -> int:
    return clip.visual.class_embedding.shape[-1]


def text_width(clip: nn.Module) -> int:
    return text_tower(clip).positional_embedding.shape[-1]


def num_layers(clip: nn.Module) -> int:
    """Layers of the shallower branch."""
    return min(len(t.transformer.resblocks) for t in (clip.visual, text_tower(clip)))


def check_clip(clip: nn.Module) -> None:
    """Raises InputError for a model that is no open_clip model with two plain transformers."""
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
    """How the text branch finds its feature: ``argmax`` (the highest token) or ``eos``."""
    return getattr(clip, "text_pool_type", None) or getattr(clip.text, "pool_type", "")


def encode_image(
    visual: nn.Module,
    images: Tensor,
    prompt: Tensor,
    deep_prompts: Tensor,
    updates: Sequence[LowRankUpdate],
    grad_checkpointing: bool = False,
) -> Tensor:
    """Images [B, 3, H, W] to features [B, embed_dim], not normalised.

    Args:
        visual: open_clip's ``VisionTransformer``.
        prompt: [1, n, D], behind the image's tokens in the first layer.
        deep_prompts: [depth − 1, B, n, D], in their place in the layers after it.
        updates: of the first layers' attention.
    """
    x = visual._embeds(images.to(visual.conv1.weight.dtype))
    prompt = visual.ln_pre(prompt.to(x.dtype)).expand(x.shape[0], -1, -1)
    x = torch.cat([x, prompt], dim=1)
    x = run_blocks(visual.transformer.resblocks, x, deep_prompts, updates, None, grad_checkpointing)
    pooled, _ = visual._pool(x[:, : -prompt.shape[1]])
    return pooled if visual.proj is None else pooled @ visual.proj


def project_text(text: nn.Module, x: Tensor) -> Tensor:
    """Text tokens [..., D] to features [..., embed_dim]."""
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
    """Transformer layers with prompts that are replaced layer by layer.

    Args:
        blocks: open_clip's ``ResidualAttentionBlock``, one per layer.
        x: [B, N + n, D]; the last n tokens are the prompts.
        deep_prompts: [depth − 1, B or 1, n, D], for the layers after the first.
        updates: one per layer, from the first on; later layers have none.
        mask: additive [N + n, N + n], or ``None``.
        grad_checkpointing: keep the layers' inputs alone and compute them again in the backward
            pass.
    """
    # All layers' at once, and so their gradients. x.shape[0], not len(x): that would fix the batch
    # size in an exported graph.
    prompts = deep_prompts.to(x.dtype).expand(-1, x.shape[0], -1, -1).unbind(0)
    for index, block in enumerate(blocks):
        if 1 <= index <= len(prompts):
            prompt = prompts[index - 1]
            x = torch.cat([x[:, : -prompt.shape[1]], prompt], dim=1)
        update = updates[index] if index < len(updates) else None
        if grad_checkpointing and torch.is_grad_enabled():
            # The frozen layers draw no random numbers, whose state no CUDA graph could save.
            x = checkpoint(
                run_block, block, x, update, mask, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x = run_block(block, x, update, mask)
    return x


def run_block(
    block: nn.Module, x: Tensor, update: LowRankUpdate | None, mask: Tensor | None
) -> Tensor:
    """One layer, [B, N, D] to the same."""
    x = x + block.ls_1(attention(block.attn, block.ln_1(x), update, mask))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def attention(
    attn: nn.MultiheadAttention, x: Tensor, update: LowRankUpdate | None, mask: Tensor | None
) -> Tensor:
    """Self-attention with updated projections, [B, N, D] to the same."""
    in_a, in_b, out_a, out_b = update or (None,) * 4
    qkv = low_rank_linear(x, attn.in_proj_weight, attn.in_proj_bias, in_a, in_b)
    # Split where their gradients are put side by side again, without another copy.
    parts = (part.unflatten(-1, (attn.num_heads, -1)) for part in qkv.chunk(3, dim=-1))
    q, k, v = (part.transpose(1, 2) for part in parts)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    y = y.transpose(1, 2).flatten(2)
    return low_rank_linear(y, attn.out_proj.weight, attn.out_proj.bias, out_a, out_b)


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None
) -> Tensor:
    """``x (W + b a)ᵀ + bias`` for x [..., in]; a and b in the dtype that is computed in.

    The update is not added to the weight: then no gradient of the weight's size is computed.
    """
    if a is None:
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    y = F.linear(rows, weight, bias)
    # The sum is part of the product, in place: no kernel and no tensor of its own.
    y = y.addmm_(F.linear(rows, a), b.t())
    return y.unflatten(0, x.shape[:-1])
