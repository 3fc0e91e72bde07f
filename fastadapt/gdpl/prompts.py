"""Compute the prompts of both branches from domain features by quaternion networks.

With features f [B, D_f], context ctx [n, 512], deep contexts p_l [n, 512], quaternion networks Q,
and noise ε ~ N(0, 1) [B, 512]:

    (1) b            = linear2(relu(linear1(f)))                      [B, 512]
    (2) text         = Q_text([0 | ctx + b + ε · mean(f)])            [B, n, 512]
    (3) vision       = proj(ctx)                                      [1, n, 768]
    (4) deep_vision_l = Q_l([0 | p_l + b])                            [B, n, 768]
    (5) deep_text_l  = p_l                                            [1, n, 512]
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError
from fastadapt.layers import QuaternionLinear

NOISES = ("train", "always", "off")


class Prompts(NamedTuple):
    """Hold the prompts that :class:`DomainPromptLearner` computes.

    Attributes:
        text: [B, n_ctx, text_width], in the first text layer; conditioned on the domain.
        vision: [1, n_ctx, vision_width], in the first vision layer; the same for all images.
        deep_text: [depth − 1, 1, n_ctx, text_width], in the deeper text layers; the same for all.
        deep_vision: [depth − 1, B, n_ctx, vision_width], in the deeper vision layers; conditioned.
    """

    text: Tensor
    vision: Tensor
    deep_text: Tensor
    deep_vision: Tensor


class DomainPromptLearner(nn.Module):
    """Turn domain features into prompts for every layer of both branches.

    Args:
        feature_dim: width D_f of the domain features.
        text_width: of the text branch; a multiple of 4.
        vision_width: of the vision branch; a multiple of 4.
        n_ctx: prompt tokens in each layer.
        depth: layers that get prompts of their own, the first one included.
        hidden: width between the two linear layers of ``meta_net``; D_f / 16 if ``None``.
        noise: when normal noise times the mean of the features is added to the language prompt:
            ``"train"`` (in training only), ``"always"`` (upstream's behaviour, which makes
            predictions random) or ``"off"``.
        deep_start: ``"cloned"``: the networks of the deep vision layers start from one draw, as
            upstream's do.

    Shape:
        Features [B, D_f] to :class:`Prompts`.

    Raises:
        InputError: a setting is invalid; features have another width.

    Source: GDPL, domain-aware language and hierarchical vision prompts; upstream
    ``MultiModalPromptLearner``.
    """

    def __init__(
        self,
        feature_dim: int,
        text_width: int,
        vision_width: int,
        n_ctx: int = 2,
        depth: int = 9,
        hidden: int | None = None,
        noise: Literal["train", "always", "off"] = "train",
        deep_start: Literal["independent", "cloned"] = "independent",
    ):
        super().__init__()
        if n_ctx < 1 or depth < 1:
            raise InputError(f"n_ctx is {n_ctx} and depth {depth}; expected at least 1 of each")
        if noise not in NOISES:
            raise InputError(f"noise is {noise!r}; expected one of {', '.join(NOISES)}")
        for name, width in (("text", text_width), ("vision", vision_width)):
            if width % 4:
                raise InputError(
                    f"the {name} branch is {width} wide; quaternion networks need a multiple of 4"
                )
        self.feature_dim = feature_dim
        self.noise = noise
        hidden = hidden or max(feature_dim // 16, 1)
        self.meta_net = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(feature_dim, hidden),
                relu=nn.ReLU(),
                linear2=nn.Linear(hidden, text_width),
            )
        )
        self.ctx = nn.Parameter(torch.empty(n_ctx, text_width))
        self.deep_ctx = nn.Parameter(torch.empty(depth - 1, n_ctx, text_width))
        nn.init.normal_(self.ctx, std=0.02)
        nn.init.normal_(self.deep_ctx, std=0.02)
        self.proj = nn.Linear(text_width, vision_width)
        # The context fills the components j and k; r and i are zero.
        quaternion: Any = {"in_features": 2 * text_width, "init": "glorot", "zero_half": True}
        self.language_net = QuaternionLinear(out_features=text_width, **quaternion)
        self.vision_nets = None
        if depth > 1:
            self.vision_nets = QuaternionLinear(
                out_features=vision_width, groups=depth - 1, **quaternion
            )
            if deep_start == "cloned":
                with torch.no_grad():
                    for weight in self.vision_nets.parameters():
                        weight.copy_(weight[:1].clone().expand_as(weight))

    @property
    def n_ctx(self) -> int:
        """Return the number of prompt tokens per layer."""
        return self.ctx.shape[0]

    @property
    def depth(self) -> int:
        """Return the number of layers with prompts of their own."""
        return len(self.deep_ctx) + 1

    def forward(self, features: Tensor) -> Prompts:
        """Compute the prompts of features [B, D_f]."""
        if features.dim() != 2 or features.shape[1] != self.feature_dim:
            raise InputError(
                f"domain features have shape {tuple(features.shape)}; expected "
                f"[B, {self.feature_dim}], the width that the prompts were made for"
            )
        features = features.to(self.ctx.dtype)
        bias = self.meta_net(features)
        noise = None
        if self.noise == "always" or (self.noise == "train" and self.training):
            noise = torch.randn(bias.shape, dtype=bias.dtype, device=bias.device)
            noise = noise * features.mean()
        return self.condition(bias, noise)

    def condition(self, bias: Tensor, noise: Tensor | None = None) -> Prompts:
        """Compute the prompts from the output of ``meta_net``; they are affine in it.

        Args:
            bias: b of equation (1), [B, text_width].
            noise: [B, text_width], added to the language prompt's.
        """
        shifted = self.ctx + (bias if noise is None else bias + noise)[:, None]
        vision = self.proj(self.ctx)[None]
        deep_text = self.deep_ctx[:, None]
        if self.vision_nets is None:
            deep_vision = vision.new_empty(0, bias.shape[0], *vision.shape[1:])
        else:
            deep_vision = self.vision_nets(deep_text + bias[:, None])
        return Prompts(self.language_net(shifted), vision, deep_text, deep_vision)

    def extra_repr(self) -> str:
        """Describe the sizes for ``repr``."""
        return f"n_ctx={self.n_ctx}, depth={self.depth}, noise={self.noise!r}"
