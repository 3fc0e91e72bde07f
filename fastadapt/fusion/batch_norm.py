"""Merge batch norms into the convolutions before them, for inference.

w' = w · γ / sqrt(σ² + ε),   b' = (b − μ) · γ / sqrt(σ² + ε) + β
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fastadapt.fusion.readers import HasBackbone, readers

M = TypeVar("M", bound=HasBackbone)
TOLERANCE = 1e-3  # relative to the largest feature; about the precision of fp16


@torch.inference_mode()
def fuse_batch_norms(model: M, example: Tensor) -> M:
    """Return a copy of a model whose frozen backbone has no batch norms after convolutions.

    On a CPU each batch norm is another pass over memory. Which batch norm reads which convolution's
    output is observed during one forward pass. If the features change (a convolution whose output
    is read by more than its batch norm), or there is nothing to merge, the model itself is
    returned.

    Args:
        model: an adapted model, or several that share a backbone, in evaluation mode.
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


def _pairs(model: HasBackbone, example: Tensor) -> dict[nn.Module, nn.Module]:
    """Map batch norms to the convolutions that feed them; each is called exactly once."""
    from timm.layers import BatchNormAct2d

    def is_norm(module: nn.Module) -> bool:
        return type(module) in (nn.BatchNorm2d, BatchNormAct2d) and bool(module.track_running_stats)

    pairs, calls = readers(model, example, lambda m: isinstance(m, nn.Conv2d), is_norm)
    fed = Counter(pairs.values())
    return {
        norm: conv for norm, conv in pairs.items() if calls[norm] == calls[conv] == fed[conv] == 1
    }
