"""Add a trainable adapter and a head to a frozen backbone.

(1) x      = backbone(images) without prefix tokens     [B, N, C]
(2) y      = adapter(x)                                 [B, N, C]
(3) logits = head(mean over tokens of y)                [B, num_classes]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastadapt import backbones
from fastadapt.backbones import Backbone
from fastadapt.config import AdaptConfig
from fastadapt.errors import InputError
from fastadapt.fusion.frozen_blocks import fused_blocks, release_fused_blocks
from fastadapt.layers import CLAdapter
from fastadapt.layers.unmodified import has_global_hooks, is_unmodified
from fastadapt.lora import apply_lora, lora_layers, replaced_parameters

__all__ = ["AdaptConfig", "AdaptedModel", "adapt"]


class AdaptedModel(nn.Module):
    """Run backbone, adapter and head, with timm's interface; made by :func:`adapt`.

    While ``frozen``, the backbone gets no gradients and keeps no graph (unless it carries
    low-rank adapters), and its batch norms and dropouts stay in evaluation mode, also after
    ``train()``. On a GPU in half precision the blocks of timm's vision transformers and ConvNeXt
    then run fused and keep a rounded copy of their weights
    (:mod:`fastadapt.fusion.frozen_blocks`).

    Attributes:
        backbone: the model that was given.
        adapter: a :class:`fastadapt.CLAdapter`, or nn.Identity.
        head: nn.Linear, or nn.Identity without classes.
        spec: of the backbone's features (:class:`fastadapt.backbones.FeatureSpec`).
        feature_fn: computes features of (backbone, images).
        input_config: of the backbone's input, as timm's ``pretrained_cfg``.
        config: the :class:`AdaptConfig`.
        frozen: whether the backbone is frozen now.
        backbone_trained: whether it was ever unfrozen, so that a checkpoint must contain it.
        replaced: the backbone's parameters that are no longer the pretrained ones, by name.
        source: how the backbone was made, for checkpoints.
        num_classes, num_features, pretrained_cfg: as in timm.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: AdaptConfig,
        num_classes: int,
    ):
        super().__init__()
        spec = backbone.spec
        self.backbone: Any = backbone.module
        self.feature_fn = backbone.feature_fn
        self.input_config = backbone.input_config
        self.source = backbone.source
        self.spec = spec
        self.config = config
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = spec.dim
        self.grad_checkpointing = False
        self.backbone_trained = False
        self.replaced: frozenset[str] = frozenset()
        self.adapter: nn.Module = nn.Identity()
        if config.adapter == "cladapter":
            self.adapter = CLAdapter(
                spec.dim,
                depth=config.depth,
                num_centers=config.num_centers,
                rank=config.rank,
                mlp_ratio=config.mlp_ratio,
                mode=config.mode,
                num_tokens=spec.num_tokens if config.mode == "token" else None,
                proj_drop=config.proj_drop,
                channels_last=spec.layout == "channels_last",
            )
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(spec.dim, num_classes)
        self.freeze()

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Return timm's configuration of the input, with the size of this model's images."""
        return {
            **self.input_config,
            "input_size": self.spec.input_size,
            "num_classes": self.num_classes,
        }

    @property
    def default_cfg(self) -> dict[str, Any]:
        """Return :attr:`pretrained_cfg` under timm's older name."""
        return self.pretrained_cfg

    def replaced_parameters(self) -> frozenset[str]:
        """Return the backbone's parameters that are no longer the pretrained ones, by name."""
        return self.replaced | replaced_parameters(self.backbone)

    def freeze(self) -> AdaptedModel:
        """Freeze the backbone (stage 1): adapter, head and low-rank adapters train."""
        self.frozen = True
        self.backbone.requires_grad_(False)
        for layer in lora_layers(self.backbone).values():
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)
        return self.train(self.training)

    def unfreeze(self) -> AdaptedModel:
        """Unfreeze the backbone (stage 2): everything trains, batch norms included."""
        self.frozen = False
        self.backbone_trained = True
        self.backbone.requires_grad_(True)
        release_fused_blocks(self.backbone)
        return self.train(self.training)

    def train(self, mode: bool = True) -> AdaptedModel:
        """Switch to training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
            for layer in lora_layers(self.backbone).values():
                layer.dropout.train(mode)
        return self

    def backbone_features(self, x: Tensor) -> Tensor:
        """Compute the adapter's input: the backbone's features without prefix tokens.

        Args:
            x: images [B, C, H, W] or volumes [B, C, D, H, W].

        Returns:
            [B, N, dim], [B, dim, H, W] (or 3D), or channels last, as ``spec.layout`` says.
        """
        if self.frozen and not lora_layers(self.backbone):
            with torch.no_grad(), fused_blocks(self.backbone, x):
                features = self.feature_fn(self.backbone, x)
        else:
            features = self.feature_fn(self.backbone, x)
        return (
            features[:, self.spec.num_prefix_tokens :] if self.spec.num_prefix_tokens else features
        )

    def adapt_features(self, features: Tensor) -> Tensor:
        """Apply the adapter to :meth:`backbone_features` (cached ones, say), in the same layout."""
        return self._adapted(self.adapter, features)

    def classify_features(self, features: Tensor) -> Tensor:
        """Map :meth:`backbone_features` (cached ones, say) to logits [B, num_classes]."""
        adapter = self.adapter
        if type(adapter) is CLAdapter and is_unmodified(adapter) and not has_global_hooks():
            # Its last norm and the pooling are one operation.
            return self.head(self._adapted(adapter.forward_pooled, features))
        return self.forward_head(self.adapt_features(features))

    def _adapted(self, adapter: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(adapter, features, use_reentrant=False)
        return adapter(features)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images to adapted features, in the backbone's layout."""
        return self.adapt_features(self.backbone_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map adapted features to logits [B, num_classes], or to pooled features [B, dim]."""
        if self.spec.layout == "channels_first":
            pooled = x.flatten(2).mean(-1)
        else:
            pooled = x.flatten(1, -2).mean(1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits [B, num_classes]."""
        return self.classify_features(self.backbone_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for ``num_classes`` (0: none); pooling stays the mean."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool is {global_pool!r}; an adapted model pools by 'avg'")
        like = next(p for p in self.parameters() if p.is_floating_point())
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, in adapter and, if it can, backbone."""
        self.grad_checkpointing = enable
        if hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(enable)


def adapt(
    backbone: str | nn.Module,
    config: AdaptConfig | None = None,
    num_classes: int = 0,
    *,
    pretrained: bool = True,
    weights: str | None = None,
) -> AdaptedModel:
    """Add an adapter and a head to a backbone, and freeze the backbone.

    Args:
        backbone: a timm name, a timm model, an open_clip model or visual tower, or any module
            with a feature function (see :class:`AdaptConfig`), for images or volumes. A module is
            used as it is, not copied; its parameters stop requiring gradients.
        config: what to add; the defaults if ``None``.
        num_classes: outputs of the head; 0 for none.
        pretrained: for a name: fetch timm's weights.
        weights: for a name: a local file of weights instead.

    Returns:
        An :class:`AdaptedModel` on the backbone's device and dtype.

    Raises:
        InputError: the name is unknown, weights do not fit, features are no tokens, map or volume,
            or LoRA targets match no layer.

    Source: CLAdapter (Li et al. 2025), sections 3 and 4; upstream ``build_model.py``.
    """
    config = config or AdaptConfig()
    if num_classes < 0:
        raise InputError(f"num_classes is {num_classes}; expected 0 or more")
    size = config.input_size
    if isinstance(backbone, str):
        source: dict[str, Any] = {
            "kind": "timm",
            "name": backbone,
            "pretrained": pretrained and weights is None,
            "weights": None if weights is None else str(weights),
        }
        module = backbones.create_backbone(
            backbone,
            pretrained=pretrained,
            weights=weights,
            image_size=None if size is None else size[-1],
        )
    elif isinstance(backbone, nn.Module):
        source = {"kind": "module", "name": type(backbone).__name__}
        module = backbone
    else:
        raise InputError(
            f"backbone is a {type(backbone).__name__}; expected a timm name or an nn.Module"
        )
    tower = backbones.image_tower(module)
    feature_fn = backbones.feature_function(tower.module, config.features)
    spec = backbones.probe(
        tower,
        feature_fn,
        input_size=size,
        layout=config.layout,
        num_prefix_tokens=config.num_prefix_tokens,
    )
    if config.lora is not None:
        apply_lora(tower.module, config.lora)
    found = Backbone(tower.module, tower.input_config, feature_fn, spec, source)
    model = AdaptedModel(found, config, num_classes)
    like = next((p for p in tower.module.parameters() if p.is_floating_point()), None)
    if like is not None:
        model.adapter.to(device=like.device, dtype=like.dtype)
        model.head.to(device=like.device, dtype=like.dtype)
    return model
