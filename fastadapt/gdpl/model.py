"""Compute GDPL's logits around a frozen CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import backbones
from fastadapt.errors import InputError
from fastadapt.gdpl import clip as towers
from fastadapt.gdpl.class_tree import ClassPrompts, Tokenizer
from fastadapt.gdpl.config import GDPLConfig
from fastadapt.gdpl.domain_encoder import DomainEncoder
from fastadapt.gdpl.low_rank import CoupledLowRank
from fastadapt.gdpl.prompts import DomainPromptLearner
from fastadapt.kernels.common.dispatch import accumulate_dtype, compute_dtype, without_autocast

HALF_DTYPES = (torch.float16, torch.bfloat16)


class GDPLModel(nn.Module):
    """Adapt a frozen CLIP model by domain prompts and coupled low-rank updates.

    Every image has its own prompt, hence its own text features. The class names' tokens form a tree
    that is encoded once per image (:class:`fastadapt.gdpl.class_tree.ClassTree`), with the result
    that encoding every pair of image and class would give.

    Args:
        clip: an open_clip model with two plain transformers (any ViT). It is used as it is, not
            copied; its parameters stop requiring gradients. All parts are moved to its device.
        domain_encoder: a timm name, a module (:class:`DomainEncoder` is made around it, or is
            given), or the width D_f of features that every call passes.
        class_names: one per output.
        config: the paper's settings if ``None``.
        tokenizer: ``tokenizer(texts, context_length=n)`` gives ids [texts, n]; open_clip's
            standard one if ``None``. Models with another need ``open_clip.get_tokenizer(name)``.

    Shape:
        Images [B, 3, H, W] with CLIP's normalisation to logits [B, classes], in fp32 at least.

    Attributes:
        clip, domain_encoder: the frozen parts.
        prompt_learner: the :class:`DomainPromptLearner`.
        low_rank: the :class:`CoupledLowRank`; ``None`` with rank 0 and once it was merged.
        class_names: the current ones; :meth:`set_class_names` changes them without training.

    Raises:
        InputError: a model of another kind, more layers than there are, names that are empty,
            duplicate or too long.

    Source: GDPL (Cao et al.); upstream ``CustomCLIP``.
    """

    def __init__(
        self,
        clip: nn.Module,
        domain_encoder: str | nn.Module | int,
        class_names: Sequence[str],
        config: GDPLConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__()
        config = config or GDPLConfig()
        towers.check_clip(clip)
        layers = towers.num_layers(clip)
        for name in ("depth", "rank_depth") if config.rank else ("depth",):
            depth = getattr(config, name)
            if not 1 <= depth <= layers:
                raise InputError(
                    f"{name} is {depth}; the shallower branch of this CLIP model has {layers} "
                    f"layers, expected 1 to {layers}"
                )
        self.config = config
        self.clip = clip.requires_grad_(False).eval()
        self.grad_checkpointing = False
        if tokenizer is None:
            import open_clip

            tokenizer = open_clip.tokenizer.SimpleTokenizer()
        self.tokenizer = tokenizer
        if isinstance(domain_encoder, int):
            self.domain_encoder, feature_dim = None, domain_encoder
        else:
            if not isinstance(domain_encoder, DomainEncoder):
                domain_encoder = DomainEncoder(domain_encoder)
            self.domain_encoder, feature_dim = domain_encoder, domain_encoder.dim
        if feature_dim < 1:
            raise InputError(f"domain_encoder is {feature_dim}; expected a width of at least 1")
        for name, default in (("mean", (0.0,) * 3), ("std", (1.0,) * 3)):
            value = getattr(clip.visual, f"image_{name}", None) or default
            value = torch.tensor(value).view(-1, 1, 1)
            self.register_buffer(f"clip_{name}", value, persistent=False)

        widths = {
            "text_width": towers.text_width(clip),
            "vision_width": towers.vision_width(clip),
        }
        self.prompt_learner = DomainPromptLearner(
            feature_dim,
            n_ctx=config.n_ctx,
            depth=config.depth,
            hidden=config.hidden,
            noise=config.noise,
            deep_start=config.deep_start,
            **widths,
        )
        self.low_rank = None
        if config.rank:
            self.low_rank = CoupledLowRank(
                layers=config.rank_depth, rank=config.rank, alpha=config.alpha, **widths
            )
        self.set_class_names(class_names)
        if self.classes.context is not None:
            with torch.no_grad():
                self.prompt_learner.ctx.copy_(self.classes.context)
        self.to(clip.visual.class_embedding.device)

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Return timm's configuration of the input images, that of the CLIP model."""
        return backbones.pretrained_cfg(self.clip.visual)

    def set_class_names(self, class_names: Sequence[str]) -> GDPLModel:
        """Change the classes and keep what was trained. Raises InputError as the class does."""
        config = self.config
        self.classes = ClassPrompts(
            self.clip,
            class_names,
            config.template,
            config.n_ctx,
            self.tokenizer,
            config.class_chunk,
        )
        self.class_names = tuple(class_names)
        return self

    def train(self, mode: bool = True) -> GDPLModel:
        """Switch the trained parts to a mode; the frozen parts stay in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the branches' layers in the backward pass to save memory."""
        self.grad_checkpointing = enable

    def set_frozen_dtype(self, dtype: torch.dtype) -> GDPLModel:
        """Cast the frozen weights to half precision, for training under autocast.

        They are cast once, not in every step, and take half the memory. The whole CLIP model is
        cast but for the logits' scale and bias. Of the domain encoder only the weights that
        autocast would cast are, those of matrix products and convolutions; it needs autocast from
        now on. Trained parameters are not cast.

        Args:
            dtype: torch.bfloat16 or torch.float16.
        """
        kept = {name: p.detach() for name, p in self.clip.named_parameters(recurse=False)}
        self.clip.to(dtype)
        for name in ("logit_scale", "logit_bias"):
            if kept.get(name) is not None:
                getattr(self.clip, name).data = kept[name]
        for module in () if self.domain_encoder is None else self.domain_encoder.modules():
            if type(module) in (nn.Linear, nn.Conv2d):
                module.to(dtype)
        return self.set_class_names(self.class_names)

    def offload_token_embedding(self) -> GDPLModel:
        """Move the CLIP model's token embedding, a sixth of ViT-B/16's weights, to the CPU.

        It is read only when class names change. ``to`` moves it back with the other weights, where
        the CLIP model's own ``encode_text`` needs it.
        """
        towers.text_tower(self.clip).token_embedding.to("cpu")
        return self

    def domain_features(self, images: Tensor) -> Tensor:
        """Compute features [B, D_f] of images [B, 3, H, W]; cache them if the images come again.

        Raises:
            InputError: the model was made with a feature width and has no encoder.
        """
        if self.domain_encoder is None:
            raise InputError(
                "this model has no domain encoder: pass domain_features "
                f"[B, {self.prompt_learner.feature_dim}] with the images"
            )
        return self.domain_encoder(images, self.clip_mean, self.clip_std)

    def encode(self, images: Tensor, domain_features: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised features of images [B, D] and, per image, of classes [B, classes, D].

        A CLIP model in half precision runs in it throughout, also under autocast: its layer norms
        compute in fp32 inside their kernels and need no casts around them.
        """
        prompts = self.prompt_learner(domain_features)
        weight = self.clip.visual.class_embedding
        half = weight.dtype in HALF_DTYPES
        dtype = weight.dtype if half else compute_dtype(weight)
        vision, text = ((), ()) if self.low_rank is None else self.low_rank(dtype)
        with without_autocast(images) if half else nullcontext():
            image_features = towers.encode_image(
                self.clip.visual,
                images,
                prompts.vision,
                prompts.deep_vision,
                vision,
                self.grad_checkpointing,
            )
            text_features = self.classes.encode(
                self.clip, prompts.text, prompts.deep_text, text, self.grad_checkpointing
            )
        return _normalize(image_features), _normalize(text_features)

    @torch.no_grad()
    def zero_shot(self, images: Tensor) -> Tensor:
        """Return logits [B, classes] of the CLIP model alone, with the same template.

        Raises:
            InputError: the template has fewer words than the prompt has tokens.
        """
        words = self.classes.context
        if words is None:
            raise InputError(
                f"the template {self.config.template!r} has no {self.config.n_ctx} words "
                "before the class name, which CLIP alone would read in place of the prompt"
            )
        half = words.dtype in HALF_DTYPES
        with without_autocast(images) if half else nullcontext():
            none = words.new_empty(0, 1, *words.shape)
            text_features = self.classes.encode(self.clip, words[None], none, ())
            image_features = self.clip.encode_image(images.to(words.dtype))
        return self._logits(_normalize(image_features), _normalize(text_features))

    def forward(self, images: Tensor, domain_features: Tensor | None = None) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, classes]; features are computed if not given."""
        if domain_features is None:
            domain_features = self.domain_features(images)
        return self._logits(*self.encode(images, domain_features))

    def _logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        # After scaling by 100, half precision could not tell apart logits that differ by 0.25.
        with without_autocast(image_features):
            logits = (text_features @ image_features[:, :, None]).squeeze(-1)
            logits = self.clip.logit_scale.to(logits.dtype).exp() * logits
            bias = getattr(self.clip, "logit_bias", None)
            return logits if bias is None else logits + bias


def _normalize(features: Tensor) -> Tensor:
    """Normalize to length 1, in fp32 at least."""
    return F.normalize(features.to(accumulate_dtype(features.dtype)), dim=-1)
