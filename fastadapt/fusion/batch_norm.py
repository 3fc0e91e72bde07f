"""Merge batch norms into the convolutions before them, for inference.

w' = w · γ / sqrt(σ² + ε),   b' = (b − μ) · γ / sqrt(σ² + ε) + β
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastadapt.adapted_model import AdaptedModel

TOLERANCE = 1e-3  # relative to the largest feature; about the precision of fp16


@torch.inference_mode()
def fuse_batch_norms(model: AdaptedModel, example: Tensor) -> AdaptedModel:
    """Return a copy of a model whose frozen backbone has no batch norms after convolutions.

    On a CPU each batch norm is another pass over memory. Which batch norm reads which convolution's
    output is observed during one forward pass. If the features change (a convolution whose output
    is read by more than its batch norm), or there is nothing to merge, the model itself is
    returned.

    Args:
        model: its backbone in evaluation mode.
        example: images [B, C, H, W]; one is enough.
    """
    fused = copy.deepcopy(model)
    pairs = _pairs(fused, example)
    if not pairs:
        return model
    for norm, conv in pairs.items():
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
    for parent in list(fused.backbone.modules()):
        for name, child in list(parent.named_children()):
            if child in pairs:
                # timm's batch norms contain the activation that follows them.
                setattr(parent, name, getattr(child, "act", nn.Identity()))
    want, got = model.backbone_features(example), fused.backbone_features(example)
    close = (got - want).abs().max() <= TOLERANCE * want.abs().max()
    return fused if close else model


def _pairs(model: AdaptedModel, example: Tensor) -> dict[nn.Module, nn.Module]:
    """Map batch norms to the convolutions that feed them; each is called exactly once."""
    from timm.layers import BatchNormAct2d

    made: dict[
        int, tuple[nn.Module, Tensor]
    ] = {}  # the tensor is held, so that its id is not reused
    calls: list[nn.Module] = []
    pairs: dict[nn.Module, nn.Module] = {}

    def after_conv(conv, _, output):
        calls.append(conv)
        made[id(output)] = (conv, output)

    def before_norm(norm, inputs):
        calls.append(norm)
        if id(inputs[0]) in made:
            pairs[norm] = made[id(inputs[0])][0]

    hooks = []
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after_conv))
        elif type(module) in (nn.BatchNorm2d, BatchNormAct2d) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(before_norm))
    model.backbone_features(example)
    for hook in hooks:
        hook.remove()
    fed = list(pairs.values())
    return {
        norm: conv
        for norm, conv in pairs.items()
        if calls.count(norm) == calls.count(conv) == fed.count(conv) == 1
    }
