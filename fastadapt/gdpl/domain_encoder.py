"""Compute one domain feature vector per image with a frozen encoder."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import backbones
from fastadapt.backbones import FeatureFn, Layout
from fastadapt.errors import InputError


class DomainEncoder(nn.Module):
    """Average a frozen encoder's tokens or map over positions, without prefix tokens.

    Args:
        encoder: a timm name, or any module that gives tokens [B, N, C] (MAE), maps [B, C, H, W]
            (SAM) or vectors [B, C].
        features: a method's name or a function of (encoder, images), if the encoder's own
            ``forward_features`` or ``forward`` is not the right one.
        layout, num_prefix_tokens, input_size: as in :class:`fastadapt.AdaptConfig`.
        normalization: ``"clip"``: the encoder sees images as CLIP's normalisation leaves them, as
            upstream does; ``"own"``: normalised as the encoder was trained.
        pretrained, weights: for a name, as for :func:`fastadapt.adapt`.

    Shape:
        Images [B, 3, H, W] with CLIP's normalisation to features [B, dim] without gradients.
        Images of another size than the encoder's are resized to it, bilinearly.

    Attributes:
        dim: D_f.

    Raises:
        InputError: an unknown name, or features of another kind.

    Source: GDPL, domain features; upstream ``remote_model`` and ``medical_model``.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        *,
        features: str | FeatureFn | None = None,
        layout: Layout | None = None,
        num_prefix_tokens: int | None = None,
        input_size: tuple[int, ...] | None = None,
        normalization: Literal["clip", "own"] = "clip",
        pretrained: bool = True,
        weights: str | None = None,
    ):
        super().__init__()
        if normalization not in ("clip", "own"):
            raise InputError(f"normalization is {normalization!r}; expected 'clip' or 'own'")
        if isinstance(encoder, str):
            size = None if input_size is None else input_size[-1]
            encoder = backbones.create_backbone(
                encoder,
                pretrained=pretrained,
                weights=weights,
                image_size=size,
                weights_name="domain_weights",
            )
        tower = backbones.image_tower(encoder)
        self.encoder = tower.module.requires_grad_(False).eval()
        given = backbones.feature_function(self.encoder, features)

        def as_tokens(module: nn.Module, x: Tensor) -> Tensor:
            y = given(module, x)
            return y[:, None] if isinstance(y, Tensor) and y.dim() == 2 else y

        self._features = as_tokens
        self.spec = backbones.probe(
            tower,
            as_tokens,
            input_size=input_size,
            layout=layout,
            num_prefix_tokens=num_prefix_tokens,
            settings="DomainEncoder",
        )
        self.dim = self.spec.dim
        self.normalization = normalization
        config = tower.input_config
        if normalization == "own" and not config.get("mean"):
            raise InputError(
                f"{type(self.encoder).__name__} does not say how its images are normalised: "
                "expected pretrained_cfg with mean and std, or normalization='clip'"
            )
        like = next(self.encoder.parameters(), torch.empty(0))
        for name, default in (("mean", (0.0,) * 3), ("std", (1.0,) * 3)):
            value = torch.tensor(config.get(name) or default).view(-1, 1, 1).to(like)
            self.register_buffer(name, value, persistent=False)

    def train(self, mode: bool = True) -> DomainEncoder:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, clip_mean: Tensor, clip_std: Tensor) -> Tensor:
        """Encode images [B, 3, H, W] that CLIP's mean and std normalised as features [B, dim]."""
        if self.normalization == "own":
            images = (images * clip_std + clip_mean - self.mean) / self.std
        size = tuple(self.spec.input_size[1:])
        if tuple(images.shape[2:]) != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        x = self._features(self.encoder, images.to(self.mean.dtype))
        if self.spec.layout == "channels_first":
            return x.flatten(2).mean(-1)
        return x.flatten(1, -2)[:, self.spec.num_prefix_tokens :].mean(1)
