"""Average the models of folds and seeds: one model, with the frozen backbone once.

    (1)  x = backbone(images)                       once, where no run changed it
    (2)  z = 1/M Σ_m head_m(mean(adapter_m(x))) / T_m,   over the M runs, each with its temperature
    (3)  logits = z / T,   T of the ensemble (:mod:`fastadapt.train.ensemble_fit`)

Where runs trained inside the backbone, each has its own, and (1) is computed M times.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.checkpoint import CONFIG, load_adapter
from fastadapt.errors import InputError
from fastadapt.files import read_json
from fastadapt.symmetries import mean_over_views, symmetric_views
from fastadapt.train.ensemble_fit import ensemble_of
from fastadapt.train.fold_results import read_folds


class FoldEnsemble(nn.Module):
    """Map images to the mean of several models' logits, by (1) to (3).

    Args:
        members: adapted models of the same classes and input; where they share a backbone, it is
            the same module in all.
        temperature: by which the mean is divided.

    Attributes:
        members: the models.
        temperature: as given.
        shared: whether they have one backbone.
        num_classes: of the logits.
    """

    def __init__(self, members: Sequence[AdaptedModel], temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature
        self.members = nn.ModuleList(members)
        self.num_classes = members[0].num_classes

    @property
    def shared(self) -> bool:
        """Whether the members have one backbone."""
        return len({id(member.backbone) for member in self.members}) == 1

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Return timm's configuration of the input."""
        return self._first.pretrained_cfg

    @property
    def _first(self) -> AdaptedModel:
        first = self.members[0]
        assert isinstance(first, AdaptedModel)
        return first

    def forward(self, x: Tensor) -> Tensor:
        """Map images to calibrated mean logits [B, num_classes]."""
        logits = self._mean(x)
        return logits if self.temperature == 1 else logits / self.temperature

    def _mean(self, x: Tensor) -> Tensor:
        if not self.shared:
            return torch.stack([member(x) for member in self.members]).mean(0)
        first, tta = self._first, self._first.config.tta
        views = x if tta == "none" else symmetric_views(x, tta)
        features = first.backbone_features(views)
        every = [member.classify_features(features) for member in self.members]
        logits = torch.stack(every).mean(0)
        return logits if tta == "none" else mean_over_views(logits, x.shape[0])


def load_folds(
    out: str | Path, backbone: nn.Module | None = None, *, weights: str | None = None
) -> FoldEnsemble:
    """Load the runs of a folder of folds as one model, in evaluation mode.

    Args:
        out: what :func:`fastadapt.train.train_folds` wrote.
        backbone, weights: as for :func:`fastadapt.load_adapter`.

    Raises:
        InputError: runs are missing or unfinished; as for :func:`fastadapt.load_adapter`.
    """
    out = Path(out)
    summary = read_folds(out)
    if not summary.get("finished"):
        raise InputError(
            f"{out} is not finished: go on with `fastadapt train` and its --resume, or export one "
            "of its run folders"
        )
    members: list[AdaptedModel] = []
    for run in summary["runs"]:
        first = members[0] if members else None
        config = read_json(out / run["folder"] / CONFIG)
        own = config.get("backbone", {}).get("trained") or config.get("changed")
        own = own or config.get("lora_layers")
        # A backbone that no run trained is loaded once.
        given = None if first is None or own else first.backbone
        member = load_adapter(
            out / run["folder"], backbone if first is None else given, weights=weights
        )
        if first is not None and _same(member.backbone, first.backbone):
            member.backbone = first.backbone
        members.append(member)
    return FoldEnsemble(members, ensemble_of(out, summary).temperature).eval()


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Say whether two backbones have the same weights, so that one serves."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )
