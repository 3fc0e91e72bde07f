"""A folded model to the steps of a fused one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.backbones import forward_features
from fastadapt.errors import InputError
from fastadapt.fusion import layer_weights as layers
from fastadapt.layers import CLAdapter

from ..folded_layers import FoldedClusterAttention
from ..graph_input import Deployed
from . import convnext, vit
from .model import FusedModel
from .steps import AdapterBlock, Head, Step


def why_not(model: nn.Module) -> str | None:
    """Say why a folded model has no fused form; ``None`` if it has."""
    from timm.models.convnext import ConvNeXt
    from timm.models.vision_transformer import VisionTransformer

    if type(model) is not AdaptedModel:
        return f"the model is a {type(model).__name__}; expected a backbone with an adapter"
    if model.config.tta != "none":
        return "its predictions are means over several views of an image"
    if model.feature_fn is not forward_features:
        return "its backbone has a feature function of its own"
    if type(model.adapter) not in (CLAdapter, nn.Identity):
        return f"its adapter is a {type(model.adapter).__name__}"
    if type(model.head) not in (nn.Linear, nn.Identity):
        return f"its head is a {type(model.head).__name__}"
    for block in getattr(model.adapter, "blocks", ()):
        if type(block.attn) is not FoldedClusterAttention:
            return f"its adapter holds a {type(block.attn).__name__}; fold the model first"
    kind = type(model.backbone)
    if kind is VisionTransformer:
        return vit.why_not(model.backbone)
    if kind is ConvNeXt:
        return convnext.why_not(model.backbone)
    return f"the backbone is a {kind.__name__}; expected timm's VisionTransformer or ConvNeXt"


@torch.no_grad()
def fuse(deployed: Deployed, dtype: torch.dtype) -> FusedModel:
    """Make a fused model of a folded one with its graph's input before it.

    Args:
        deployed: takes uint8 images; its model is folded, in fp32.
        dtype: of the products, bf16 or fp16 (fp32: to compare).

    Raises:
        InputError: the model has no fused form, with the reason.
    """
    model: Any = deployed.model
    reason = None
    if not (deployed.is_uint8 and deployed.normalize):
        reason = "its input is not uint8, normalised in the graph"
    reason = reason or why_not(model)
    if reason is not None:
        raise InputError(
            f"`fused` takes timm's vision transformers and ConvNeXt with a CLAdapter: {reason}"
        )
    from timm.models.convnext import ConvNeXt

    backbone, mean, std = model.backbone, deployed.mean, deployed.std
    height, width = model.pretrained_cfg["input_size"][1:]
    if type(backbone) is ConvNeXt:
        steps = [*convnext.steps_of(backbone, mean, std, dtype), convnext.tokens_step()]
    else:
        prefix = model.spec.num_prefix_tokens
        class_token = model.config.pool == "token" and prefix > 0
        steps = vit.steps_of(backbone, mean, std, (height, width), dtype)
        steps.append(vit.tokens_step(backbone, prefix, class_token))
    steps += _adapter(model, dtype)
    return FusedModel(steps, (height, width), dtype)


def _adapter(model: Any, dtype: torch.dtype) -> list[Step]:
    adapter, head = model.adapter, model.head
    found: list[Step] = []
    norm: dict[str, Any] = {}
    if type(adapter) is CLAdapter:
        for index, block in enumerate(adapter.blocks):
            found.append(_block(block, adapter.norm1 if index == 0 else None, dtype))
        norm = _norm("norm", adapter.norm2, dtype)
    eps = adapter.norm2.eps if norm else 0.0
    if type(head) is nn.Identity:
        return [*found, Head(eps, **norm)]
    weight, bias = layers.linear(head)
    last = {"weight": layers.rounded(weight, dtype), "bias": layers.rounded(bias, dtype)}
    return [*found, Head(eps, **norm, **last)]


def _norm(name: str, norm: nn.LayerNorm, dtype: torch.dtype) -> dict[str, Tensor]:
    vectors = {f"{name}_weight": norm.weight, f"{name}_bias": norm.bias}
    return {key: layers.rounded(vector, dtype) for key, vector in vectors.items()}


def _block(block: Any, norm0: nn.LayerNorm | None, dtype: torch.dtype) -> AdapterBlock:
    attn = block.attn
    # The adapter's operations take vectors in the dtype of their input.
    found: dict[str, Any] = _norm("norm1", block.ln_1, dtype) | _norm("norm2", block.ln_2, dtype)
    if norm0 is not None:
        found |= _norm("norm0", norm0, dtype)
    pairs = {"fc1": block.mlp.fc1, "fc2": block.mlp.fc2, "down": attn.down, "up": attn.up}
    for name, layer in pairs.items():
        if layer is not None:
            for part, tensor in layers.linear(layer)._asdict().items():
                found[f"{name}_{part}"] = layers.rounded(tensor, dtype)
    transforms = attn.transforms.detach().unflatten(1, (attn.width, attn.width))
    return AdapterBlock(
        eps0=0.0 if norm0 is None else norm0.eps,
        eps1=block.ln_1.eps,
        eps2=block.ln_2.eps,
        centers=layers.rounded(attn.centers, dtype),
        transforms=layers.rounded(transforms, dtype),
        **found,
    )
