"""Fold the parts of GDPL for inference; :mod:`fastadapt.export.fold` folds whole models."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.errors import InputError
from fastadapt.gdpl.clip import low_rank_linear, text_tower
from fastadapt.gdpl.low_rank import LowRankUpdate
from fastadapt.gdpl.model import GDPLModel
from fastadapt.gdpl.prompts import DomainPromptLearner, Prompts


class FoldedPromptLearner(nn.Module):
    """Compute the prompts for inference by two linear layers.

    After the ReLU everything is affine: the second layer of ``meta_net``, the added context and
    the quaternion networks of all layers are one linear layer here. Prompts that do not depend on
    the image are constants.

    Shape:
        Features [B, D_f] to :class:`Prompts`.

    Raises:
        InputError: the learner adds noise to its prompts at inference.
    """

    def __init__(self, learner: DomainPromptLearner):
        super().__init__()
        if learner.noise == "always":
            raise InputError(
                "noise='always' makes predictions random, which no folded model repeats: make the "
                "model with noise='train' or 'off'"
            )
        wide = copy.deepcopy(learner).double()
        hidden = wide.meta_net.linear2.in_features
        # An affine map is determined by its values at zero and at every unit vector.
        points = torch.cat([torch.zeros(1, hidden), torch.eye(hidden)]).to(wide.ctx)
        prompts = wide.condition(wide.meta_net.linear2(points))
        values = torch.cat(
            [prompts.text.flatten(1), prompts.deep_vision.transpose(0, 1).flatten(1)], 1
        )
        dtype = learner.ctx.dtype
        self.linear1 = learner.meta_net.linear1
        self.linear2 = nn.Linear(hidden, values.shape[1], device="meta")
        self.linear2.weight = nn.Parameter((values[1:] - values[:1]).t().contiguous().to(dtype))
        self.linear2.bias = nn.Parameter(values[0].to(dtype))
        self.vision = nn.Parameter(prompts.vision.to(dtype))
        self.deep_text = nn.Parameter(prompts.deep_text.to(dtype))
        self.feature_dim = learner.feature_dim

    def forward(self, features: Tensor) -> Prompts:
        """Compute the prompts of features [B, D_f]."""
        y = self.linear2(F.relu(self.linear1(features.to(self.vision.dtype))))
        layers, _, n_ctx, text_width = self.deep_text.shape
        text, deep_vision = y.tensor_split((n_ctx * text_width,), dim=1)
        return Prompts(
            text.unflatten(1, (n_ctx, text_width)),
            self.vision,
            self.deep_text,
            deep_vision.unflatten(1, (layers, n_ctx, self.vision.shape[2])).transpose(0, 1),
        )

    def extra_repr(self) -> str:
        """Describe the sizes for ``repr``."""
        return f"layers={len(self.deep_text) + 1}, n_ctx={self.vision.shape[1]}"


class CoupledLinear(nn.Module):
    """Apply an attention projection and its low-rank update separately, as the unfolded model."""

    def __init__(self, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = nn.Parameter(weight), bias
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return low_rank_linear(x, self.weight, self.bias, self.a, self.b)


class MergedProjection(NamedTuple):
    """Describe one projection before and after merging.

    Attributes:
        name: of the attention layer and its projection in the model.
        before, after: the two layers.
        weight_change: relative Frobenius norm of the update.
    """

    name: str
    before: CoupledLinear
    after: nn.Linear
    weight_change: float


def merge_low_rank(model: GDPLModel) -> list[MergedProjection]:
    """Add the low-rank updates to the weights of both branches in fp64, and drop them.

    The CLIP model inside ``model`` is changed.
    """
    if model.low_rank is None:
        return []
    low_rank = copy.deepcopy(model.low_rank).double()
    model.low_rank = None
    text = "clip.text" if hasattr(model.clip, "text") else "clip"
    towers = (("clip.visual", model.clip.visual), (text, text_tower(model.clip)))
    merged = []
    for (branch, tower), updates in zip(towers, low_rank(), strict=True):
        for index, update in enumerate(updates):
            attn = tower.transformer.resblocks[index].attn
            name = f"{branch}.transformer.resblocks.{index}.attn"
            merged += _merge(name, attn, update)
    return merged


def _merge(name: str, attn: nn.MultiheadAttention, update: LowRankUpdate) -> list[MergedProjection]:
    merged = []
    out = attn.out_proj
    for leaf, owner, key, bias, a, b in (
        ("in_proj", attn, "in_proj_weight", attn.in_proj_bias, update.in_a, update.in_b),
        ("out_proj", out, "weight", out.bias, update.out_a, update.out_b),
    ):
        weight = getattr(owner, key).detach()
        delta = b @ a
        rows, columns = weight.shape
        after = nn.Linear(columns, rows, device="meta")
        new = nn.Parameter((weight.double() + delta).to(weight.dtype), requires_grad=False)
        after.weight, after.bias = new, bias
        setattr(owner, key, new)
        change = (delta.norm() / weight.double().norm()).item()
        before = CoupledLinear(weight, bias, a, b)
        merged.append(MergedProjection(f"{name}.{leaf}", before, after, change))
    return merged
