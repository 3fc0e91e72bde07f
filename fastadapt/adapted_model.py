"""Add a trainable adapter and a head to a frozen backbone.

(1) x      = backbone(images) without prefix tokens     [B, N, C]
(2) y      = adapter(x)                                 [B, N, C]
(3) logits = head(mean over tokens of y)                [B, num_classes]
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastadapt import backbones
from fastadapt.backbones import Backbone
from fastadapt.config import AdaptConfig
from fastadapt.errors import InputError
from fastadapt.fusion.frozen_blocks import fused_blocks, release_fused_blocks
from fastadapt.fusion.image_operators import image_operators
from fastadapt.layers import CLAdapter
from fastadapt.layers.unmodified import has_global_hooks, is_unmodified
from fastadapt.lora import (
    apply_lora,
    claim_lora,
    is_low_rank,
    lora_layers,
    refuse_claimed_lora,
    replaced_parameters,
)
from fastadapt.symmetries import mean_over_views, symmetric_views
from fastadapt.trainable import (
    last_blocks,
    plain_name,
    uncompiled,
    unfrozen_modules,
    used_parameters,
)

__all__ = ["AdaptConfig", "AdaptedModel", "adapt"]


class AdaptedModel(nn.Module):
    """Run backbone, adapter and head, with timm's interface; made by :func:`adapt`.

    While ``frozen``, the backbone gets no gradients and keeps no graph (unless it carries
    low-rank adapters, or parameters that were unfrozen one by one), and its batch norms and
    dropouts stay in evaluation mode, also after ``train()``. On a GPU in half precision the blocks
    of timm's vision transformers and ConvNeXt then run fused and keep a rounded copy of their
    weights (:mod:`fastadapt.fusion.frozen_blocks`).

    Attributes:
        backbone: the model that was given.
        adapter: a :class:`fastadapt.CLAdapter`, or nn.Identity.
        head: nn.Linear, or nn.Identity without classes.
        spec: of the backbone's features (:class:`fastadapt.backbones.FeatureSpec`).
        feature_fn: computes features of (backbone, images).
        input_config: of the backbone's input, as timm's ``pretrained_cfg``.
        config: the :class:`AdaptConfig`.
        frozen: whether the backbone is frozen now.
        unfrozen: names of the parameters of the backbone's last blocks while they alone train.
        backbone_trained: whether the whole backbone was ever unfrozen, so that a checkpoint must
            contain it.
        replaced: names of the backbone's tensors that are no longer the pretrained ones.
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
        # Of the prefix tokens the first is the class token, where there is one.
        has_one = getattr(uncompiled(self.backbone), "has_class_token", True)
        self._class_token = config.pool == "token" and spec.num_prefix_tokens > 0 and has_one
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = spec.dim
        self.grad_checkpointing = False
        self.backbone_trained = False
        self.replaced: frozenset[str] = frozenset()
        self.unfrozen: frozenset[str] = frozenset()
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

    def replaced_tensors(self) -> frozenset[str]:
        """Return the names of the backbone's tensors that are no longer the pretrained ones.

        They are those that :func:`fastadapt.load_peft` replaced, that :meth:`unfreeze` unfroze, and
        that require gradients now; low-rank adapters, which every checkpoint holds, are left out.
        """
        trained = {name for name, p in self.backbone.named_parameters() if p.requires_grad}
        trained |= self._buffers_of(trained)
        plain = {plain_name(name) for name in trained if not is_low_rank(name)}
        return self.replaced | replaced_parameters(self.backbone) | plain

    def _buffers_of(self, parameters: Collection[str]) -> set[str]:
        """Return the buffers (running statistics) of modules all of whose parameters train."""
        found = set()
        for name, part in unfrozen_modules(self.backbone, parameters):
            found |= {f"{name}.{key}" if name else key for key, _ in part.named_buffers()}
        kept = self.backbone.state_dict().keys() if found else ()
        return found & set(kept)

    def freeze(self) -> AdaptedModel:
        """Freeze the backbone (stage 1): adapter, head and low-rank adapters train."""
        self.frozen = True
        self.unfrozen = frozenset()
        self.backbone.requires_grad_(False)
        for layer in lora_layers(self.backbone).values():
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)
        return self.train(self.training)

    def unfreeze(self, last: int | None = None) -> AdaptedModel:
        """Unfreeze the backbone, or its last blocks (stage 2), batch norms included.

        Parameters that the features do not depend on (a classifier of the backbone) stay frozen.

        Args:
            last: the number of blocks at the end of the backbone that train, with all that follows
                them; ``None`` for the whole backbone. timm's models say what a block is.

        Raises:
            InputError: the backbone has fewer blocks, or none that are recognised; its features
                carry no gradients.
        """
        chosen = used_parameters(self.backbone, self.feature_fn, self.spec)
        if last is not None:
            chosen &= last_blocks(self.backbone, last)
        self.freeze()
        self.frozen = False
        for name, parameter in self.backbone.named_parameters():
            if name in chosen:
                parameter.requires_grad_(True)
        if last is None:
            self.backbone_trained = True
        else:
            self.unfrozen = frozenset(chosen)
        release_fused_blocks(self.backbone)
        return self.train(self.training)

    def train(self, mode: bool = True) -> AdaptedModel:
        """Switch to training mode; what is frozen of the backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen or self.unfrozen:
            self.backbone.eval()
            for _, part in unfrozen_modules(self.backbone, self.unfrozen):
                part.train(mode)
            for layer in lora_layers(self.backbone).values():
                layer.dropout.train(mode)
        if mode and not self.backbone_trained:
            self.replaced = self.replaced_tensors()  # also if they are frozen before they are saved
        return self

    def backbone_features(self, x: Tensor) -> Tensor:
        """Compute the adapter's input: the backbone's features without prefix tokens.

        With ``pool="token"`` it is the class token alone.

        Args:
            x: images [B, C, H, W] or volumes [B, C, D, H, W].

        Returns:
            [B, N, dim], [B, dim, H, W] (or 3D), or channels last, as ``spec.layout`` says.
        """
        return self.adapter_input(self.all_features(x))

    def all_features(self, x: Tensor) -> Tensor:
        """Compute the backbone's features with prefix tokens, as its feature function gives them.

        They depend on the backbone and that function alone, so that models which share both can
        share them; :meth:`adapter_input` takes what this model's adapter reads.
        """
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            with (
                torch.no_grad(),
                image_operators(self.backbone, x),
                fused_blocks(self.backbone, x),
            ):
                return self.feature_fn(self.backbone, x)
        with image_operators(self.backbone, x):
            return self.feature_fn(self.backbone, x)

    def adapter_input(self, features: Tensor) -> Tensor:
        """Return :meth:`all_features` without prefix tokens, or their class token alone."""
        if self._class_token:
            return features[:, :1]
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
        """Map images to logits [B, num_classes].

        With ``config.tta`` and in evaluation mode they are the mean over the symmetric views.
        """
        if self.training or self.config.tta == "none":
            return self.classify_features(self.backbone_features(x))
        views = symmetric_views(x, self.config.tta)
        return mean_over_views(self.classify_features(self.backbone_features(views)), x.shape[0])

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
            LoRA targets match no layer, or the backbone carries the low-rank adapters of another
            adapted model.

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
            drop_path=config.drop_path,
        )
    elif isinstance(backbone, nn.Module):
        if config.drop_path and not any(getattr(m, "drop_prob", 0) for m in backbone.modules()):
            raise InputError(
                f"drop_path is {config.drop_path}, but the backbone was made without: make it with "
                f"timm.create_model(..., drop_path_rate={config.drop_path})"
            )
        source = {"kind": "module", "name": type(backbone).__name__}
        module = backbone
    else:
        raise InputError(
            f"backbone is a {type(backbone).__name__}; expected a timm name or an nn.Module"
        )
    tower = backbones.image_tower(module)
    refuse_claimed_lora(tower.module)
    feature_fn = backbones.feature_function(tower.module, config.features)
    spec = backbones.probe(
        tower,
        feature_fn,
        input_size=size,
        layout=config.layout,
        num_prefix_tokens=config.num_prefix_tokens,
    )
    if config.tta != "none" and (len(spec.input_size) != 3 or not num_classes):
        what = "volumes" if num_classes else "features"
        raise InputError(f"tta is {config.tta!r}, which averages logits of images, not {what}")
    if config.tta == "dihedral" and spec.input_size[1] != spec.input_size[2]:
        raise InputError(f"tta is 'dihedral', which needs square images, not {spec.input_size}")
    found = Backbone(tower.module, tower.input_config, feature_fn, spec, source)
    model = AdaptedModel(found, config, num_classes)
    if config.lora is not None:
        apply_lora(tower.module, config.lora)
        model.freeze()
    claim_lora(tower.module)
    like = next((p for p in tower.module.parameters() if p.is_floating_point()), None)
    if like is not None:
        model.adapter.to(device=like.device, dtype=like.dtype)
        model.head.to(device=like.device, dtype=like.dtype)
    return model
