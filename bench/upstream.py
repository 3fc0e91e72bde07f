"""Restate upstream's formulations on our weights: what benchmarks and tests compare with.

Sources: qklee-lz/CLAdapter for cluster attention and the adapter, caoql98/GDPL for quaternion
layers, prompts and the loop over images. The steps are upstream's, its memory use included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.backbones import embed_clip_patches
from fastadapt.gdpl import GDPLModel
from fastadapt.gdpl.clip import text_tower
from fastadapt.gdpl.low_rank import LowRankUpdate
from fastadapt.gdpl.prompts import DomainPromptLearner
from fastadapt.kernels import quaternion_matrix
from fastadapt.layers.cladapter import CLAdapterBlock
from fastadapt.train.feature_cache import as_tokens


def cluster_attention(
    x: Tensor,
    centers: Tensor,
    transforms: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
) -> Tensor:
    """Compute cluster attention in channel mode with upstream's [B, K, R, R].

    Args:
        x: [B, N, C].
        centers: [C, K].
        transforms: [K, R, R].
        down_weight: [R, C].
        down_bias: [R].
        up_weight: [C, R].
        up_bias: [C].

    Returns:
        [B, N, C].
    """
    batch = x.shape[0]
    q = F.normalize(x.mean(dim=1), dim=-1)
    a = (q @ F.normalize(centers, dim=0)).softmax(dim=-1)
    spread = transforms.unsqueeze(0).expand(batch, -1, -1, -1)
    mixed = (a[:, :, None, None] * spread).sum(dim=1)
    h = F.linear(x, down_weight, down_bias)
    return F.linear(h @ mixed, up_weight, up_bias)


class ClusterAttention(nn.Module):
    """Run :func:`cluster_attention` on the weights of a :class:`fastadapt.ClusterAttention`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, C] to [B, N, C]."""
        own = self.layer
        down, up = own.down, own.up
        return cluster_attention(
            x, own.centers, own.transforms, down.weight, down.bias, up.weight, up.bias
        )


def cladapter_block(
    block: CLAdapterBlock, attend: Callable[..., Tensor] = cluster_attention
) -> Callable[[Tensor], Tensor]:
    """Return a CLAdapter block in PyTorch's operators around a formulation of cluster attention.

    Args:
        block: whose weights are used.
        attend: takes the arguments of :func:`cluster_attention`.
    """
    a: Any = block.attn
    mlp: Any = block.mlp
    weights = a.centers, a.transforms, a.down.weight, a.down.bias, a.up.weight, a.up.bias

    def call(x: Tensor) -> Tensor:
        x = attend(block.ln_1(x), *weights)
        return x + mlp.fc2(F.gelu(mlp.fc1(block.ln_2(x))))

    return call


class CLAdapterModel(nn.Module):
    """Upstream's forward pass on the weights of an adapted model, the backbone in the graph."""

    def __init__(self, model: AdaptedModel):
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, classes]."""
        model, adapter = self.model, self.model.adapter
        x = model.feature_fn(model.backbone, images)[:, model.spec.num_prefix_tokens :]
        x = adapter.norm1(as_tokens(model, x))
        for block in adapter.blocks:
            x = cladapter_block(block)(x)
        return model.head(adapter.norm2(x).mean(1))


def quaternion_linear(
    x: Tensor,
    weight_r: Tensor,
    weight_i: Tensor,
    weight_j: Tensor,
    weight_k: Tensor,
    bias: Tensor,
) -> Tensor:
    """Compute a quaternion layer in fp32 at least, whatever the input is, as upstream does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = (w.to(wide) for w in (weight_r, weight_i, weight_j, weight_k))
    return (x.to(wide) @ quaternion_matrix(*weights) + bias.to(wide)).to(x.dtype)


def padded_quaternion_layer(layer: Any, x: Tensor, index: int | None = None) -> Tensor:
    """Apply a quaternion layer to ``x`` padded with zeros in front, its matrix built first.

    Args:
        layer: whose weights are used.
        x: [..., in_features / 2]: the r and i components are zero.
        index: of the network, where the layer holds several.
    """
    weights = [getattr(layer, f"{name}_weight") for name in "rijk"]
    bias = layer.bias
    if index is not None:
        weights, bias = [w[index] for w in weights], bias[index]
    return torch.cat([torch.zeros_like(x), x], dim=-1) @ quaternion_matrix(*weights) + bias


def prompts(learner: DomainPromptLearner, features: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return prompts of the first text layer, the first vision layer and deeper vision layers.

    Args:
        learner: whose weights are used.
        features: [B, width], the domain features.
    """
    bias = learner.meta_net(features)[:, None]
    text = padded_quaternion_layer(learner.language_net, learner.ctx + bias)
    deep = [
        padded_quaternion_layer(learner.vision_nets, prompt + bias, index)
        for index, prompt in enumerate(learner.deep_ctx)
    ]
    return text, learner.proj(learner.ctx), deep


class GDPLLoop(nn.Module):
    """GDPL's loop over images on the weights of a :class:`GDPLModel`.

    One pass of the text branch per image, at the model's whole context length; quaternion products
    on inputs padded with zeros, one network after the other; attention as products and a softmax.

    Args:
        model: whose weights are used.
        tokens: [classes, context length], the texts' tokens.
    """

    def __init__(self, model: GDPLModel, tokens: Tensor):
        super().__init__()
        self.model: Any = model
        tower: Any = text_tower(model.clip)
        with torch.no_grad():
            embedded = tower.token_embedding(tokens)
        self.prefix, self.suffix = embedded[:, :1], embedded[:, 1 + model.config.n_ctx :]
        self.ends = tokens.argmax(dim=-1)

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        """Map images [B, 3, H, W] and domain features [B, width] to logits [B, classes]."""
        model, visual = self.model, self.model.clip.visual
        first, prompt, deep = prompts(model.prompt_learner, features)
        vision, text = model.low_rank()
        x = embed_clip_patches(visual, images)
        x = torch.cat([x, visual.ln_pre(prompt.expand(len(x), -1, -1))], dim=1)
        n = prompt.shape[0]
        for index, block in enumerate(visual.transformer.resblocks):
            if 1 <= index <= len(deep):
                x = torch.cat([x[:, :-n], deep[index - 1]], dim=1)
            x = _clip_block(block, x, vision[index] if index < len(vision) else None, None)
        image_features = visual.ln_post(x[:, 0]) @ visual.proj
        image_features = image_features / image_features.norm(dim=-1, keepdim=True)
        logits = []
        for prompt, feature in zip(first, image_features, strict=True):
            text_features = self._encode_text(prompt, text)
            text_features = text_features / text_features.norm(dim=-1, keepdim=True)
            logits.append(model.clip.logit_scale.exp() * feature @ text_features.t())
        return torch.stack(logits)

    def _encode_text(self, prompt: Tensor, updates: Sequence[LowRankUpdate]) -> Tensor:
        tower: Any = text_tower(self.model.clip)
        deep = self.model.prompt_learner.deep_ctx
        classes, n = len(self.prefix), len(prompt)
        x = torch.cat([self.prefix, prompt.expand(classes, -1, -1), self.suffix], dim=1)
        x = x + tower.positional_embedding
        mask = tower.attn_mask.to(x.dtype)
        for index, block in enumerate(tower.transformer.resblocks):
            if 1 <= index <= len(deep):
                deeper = deep[index - 1].expand(classes, -1, -1)
                x = torch.cat([x[:, :1], deeper, x[:, 1 + n :]], dim=1)
            x = _clip_block(block, x, updates[index] if index < len(updates) else None, mask)
        rows = torch.arange(classes, device=x.device)
        return tower.ln_final(x)[rows, self.ends] @ tower.text_projection


def _clip_block(block: Any, x: Tensor, update: LowRankUpdate | None, mask: Tensor | None) -> Tensor:
    """Apply a block of CLIP with low-rank updates beside its projections."""
    attn, (batch, tokens, _) = block.attn, x.shape
    y = block.ln_1(x)
    qkv = F.linear(y, attn.in_proj_weight, attn.in_proj_bias)
    if update is not None:
        qkv = qkv + F.linear(F.linear(y, update.in_a), update.in_b)
    q, k, v = (
        part.view(batch, tokens, attn.num_heads, -1).transpose(1, 2).flatten(0, 1)
        for part in qkv.chunk(3, dim=-1)
    )
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
    scores = scores if mask is None else scores + mask
    y = (scores.softmax(dim=-1) @ v).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
    out = attn.out_proj(y)
    if update is not None:
        out = out + F.linear(F.linear(y, update.out_a), update.out_b)
    x = x + out
    return x + block.mlp(block.ln_2(x))
