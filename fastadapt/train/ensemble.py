"""Average the models of folds and seeds: one model, with the frozen backbone once.

    (1)  x = backbone(images)                       once, where no run changed it
    (2)  z = 1/M Σ_m head_m(mean(adapter_m(x))) / T_m,   over the M runs, each with its temperature
    (3)  logits = z / T,   T of the ensemble (:mod:`fastadapt.train.ensemble_fit`)

Where runs trained inside the backbone, each has its own, and (1) is computed M times.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.checkpoint import CONFIG, load_adapter
from fastadapt.errors import InputError
from fastadapt.files import read_json
from fastadapt.train.ensemble_fit import ensemble_of
from fastadapt.train.fold_results import read_folds
from fastadapt.train.shared_backbone import SharedBackbone, same_weights


class FoldEnsemble(SharedBackbone):
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
        super().__init__(members)
        self.temperature = temperature
        self.num_classes = members[0].num_classes

    def combine(self, logits: list[Tensor]) -> Tensor:
        """Average the members' logits, and divide by the temperature."""
        mean = torch.stack(logits).mean(0)
        return mean if self.temperature == 1 else mean / self.temperature

    def forward(self, x: Tensor) -> Tensor:
        """Map images to calibrated mean logits [B, num_classes]."""
        return self.combine(self.logits_of_members(x))


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
        if first is not None and same_weights(member.backbone, first.backbone):
            member.backbone = first.backbone
        members.append(member)
    return FoldEnsemble(members, ensemble_of(out, summary).temperature).eval()
