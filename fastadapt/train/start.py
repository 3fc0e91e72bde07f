"""Start training from what another run trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.checkpoint import CONFIG, WEIGHTS, load_adapter
from fastadapt.errors import InputError
from fastadapt.files import read_json, sha256_file
from fastadapt.train.fold_results import FOLDS, read_folds
from fastadapt.train.run_folder import check_finished


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        model: with the other run's weights; a new head where its classes are others.
        preprocess: how the other run saw its images, but for the range of their values.
        weights_sha256: hash of the other run's weights.
    """

    model: AdaptedModel
    preprocess: dict[str, Any]
    weights_sha256: str


def start_from(
    run: Path, backbone: str | nn.Module | None, classes: Sequence[str], weights: str | None
) -> Start:
    """Load the model of a run for another data set.

    Args:
        run: a finished run, or what ``save_adapter`` wrote.
        backbone: the module, if the run was made on one; a name must be the run's.
        classes: of the new data set.
        weights: a local file of the backbone's weights, where the recorded one is gone.

    Raises:
        InputError: as for :func:`fastadapt.load_adapter`; the run is unfinished, or of another
            backbone.
    """
    if not run.is_dir():
        raise InputError(f"{run} is no folder; expected a training run as `init`")
    if (run / FOLDS).is_file():
        first = next((row["folder"] for row in read_folds(run).get("runs", ())), "fold-1")
        raise InputError(f"{run} holds several runs: name one of them, {run / first}, as `init`")
    check_finished(run)
    config = read_json(run / CONFIG)
    module = backbone if isinstance(backbone, nn.Module) else None
    model = load_adapter(run, module, weights=weights)
    if isinstance(backbone, str) and backbone != model.source["name"]:
        raise InputError(
            f"{run} was trained on {model.source['name']}, not on {backbone}: leave `backbone` out"
        )
    if config.get("labels") != list(classes):
        model.reset_classifier(len(classes))
    preprocess = config.get("preprocess")
    preprocess = dict(preprocess) if isinstance(preprocess, dict) else {}
    preprocess.pop("intensity_range", None)  # of these images, as TrainConfig says
    return Start(model, preprocess, sha256_file(run / WEIGHTS))
