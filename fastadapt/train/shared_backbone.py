"""Several adapted models after one backbone, whose features are computed once.

(1)  x = backbone(images)                       once, where the models share it
(2)  z_m = head_m(mean(adapter_m(x)))           for each of M models
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.config import AdaptConfig
from fastadapt.symmetries import mean_over_views, symmetric_views


class SharedBackbone(nn.Module):
    """Base of models that are made of several; a member may be one itself.

    Args:
        members: models of the same input and test-time augmentation; where they share a backbone,
            it is the same module in all.

    Attributes:
        members: the models.
        shared: whether they have one backbone, and adapt the same of its features.
    """

    def __init__(self, members: Sequence[AdaptedModel | SharedBackbone]):
        super().__init__()
        self.members = nn.ModuleList(members)
        # Found out once: torch.export gives each path to a module an object of its own.
        kinds = {(id(model.backbone), model.config.features) for model in self.models}
        self.shared = len(kinds) == 1

    @property
    def models(self) -> list[AdaptedModel]:
        """The adapted models, those of members that are made of several among them."""
        found: list[AdaptedModel] = []
        for member in self.members:
            assert isinstance(member, AdaptedModel | SharedBackbone)
            found += [member] if isinstance(member, AdaptedModel) else member.models
        return found

    @property
    def backbone(self) -> Any:
        """The first model's backbone."""
        return self.models[0].backbone

    @property
    def config(self) -> AdaptConfig:
        """The first model's configuration."""
        return self.models[0].config

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Return timm's configuration of the input."""
        return self.models[0].pretrained_cfg

    def all_features(self, x: Tensor) -> Tensor:
        """Compute the backbone's features with prefix tokens."""
        return self.models[0].all_features(x)

    def backbone_features(self, x: Tensor) -> Tensor:
        """Compute the first model's features, as :meth:`AdaptedModel.backbone_features`."""
        return self.models[0].backbone_features(x)

    def classify_each(self, features: Tensor) -> list[Tensor]:
        """Map :meth:`all_features` to each member's logits [B, its classes]."""
        return [
            member.combine(member.classify_each(features))
            if isinstance(member, SharedBackbone)
            else member.classify_features(member.adapter_input(features))
            for member in self.members
        ]

    def combine(self, logits: list[Tensor]) -> Tensor:
        """Make one output of the members'."""
        raise NotImplementedError(f"{type(self).__name__} has an output for each member")

    def logits_of_members(self, x: Tensor) -> list[Tensor]:
        """Map images to each member's logits [B, its classes], by (1) and (2).

        With ``config.tta`` they are the means over the symmetric views.
        """
        if not self.shared:
            return [member(x) for member in self.members]
        tta = self.config.tta
        if tta == "none":
            return self.classify_each(self.all_features(x))
        each = self.classify_each(self.all_features(symmetric_views(x, tta)))
        return [mean_over_views(logits, x.shape[0]) for logits in each]


class TaskModels(SharedBackbone):
    """Map images to several tasks' logits, with one pass through the frozen backbone.

    Args:
        members: a model for each task.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images to logits [B, classes of the task], one for each task in order."""
        return tuple(self.logits_of_members(x))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Say whether two backbones have the same weights, so that one serves."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
