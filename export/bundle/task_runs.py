"""Several runs as one model: the frozen backbone once, an adapter and an output for each task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.checkpoint import CONFIG
from fastadapt.decision import LIKELIEST
from fastadapt.errors import InputError
from fastadapt.files import read_json
from fastadapt.gdpl.checkpoint import FORMAT as GDPL_FORMAT
from fastadapt.train.ensemble import FoldEnsemble
from fastadapt.train.fold_results import FORMAT as FOLDS_FORMAT
from fastadapt.train.shared_backbone import TaskModels

from .samples import Samples, folder_samples, merge_samples, run_samples
from .trained import Trained, TrainedTask, load_run, read_run


class _Run(NamedTuple):
    """A run that is to be a task.

    Attributes:
        folder: of the run, or of folds.
        config: what :func:`read_run` returned.
        model: the configuration of its model, or of the first of its folds.
    """

    folder: Path
    config: dict[str, Any]
    model: dict[str, Any]


def load_tasks(
    runs: Mapping[str, Path], *, backbone: nn.Module | None = None, weights: str | None = None
) -> Trained:
    """Load runs that share a frozen backbone as one model with an output for each.

    Args:
        runs: folders of runs, or of folds, by the names of their tasks.
        backbone, weights: as for :func:`load_run`.

    Raises:
        InputError: a run changed the backbone, or has no classes; two runs differ in backbone,
            weights, input or preprocessing; as for :func:`load_run`.
    """
    found = [_read(folder) for folder in runs.values()]
    for run in found:
        _check_same(found[0], run)
    parts: list[TrainedTask] = []
    for name, run in zip(runs, found, strict=True):
        given = backbone if not parts else _member(parts[0].trained.model).backbone
        trained = load_run(run.folder, run.config, backbone=given, weights=weights)
        if not trained.labels:
            raise InputError(f"{run.folder} has no classes: only runs with a head are tasks")
        if parts:
            _check_preprocessing(found[0].folder, parts[0].trained, run.folder, trained)
        parts.append(TrainedTask(name, trained))
    first = parts[0].trained
    return replace(
        first,
        model=TaskModels([_member(part.trained.model) for part in parts]).eval(),
        labels=[],
        source={"runs": {part.name: part.trained.source["run"] for part in parts}},
        decision=LIKELIEST,
        quality=None,
        parts=tuple(parts),
    )


def task_samples(runs: Mapping[str, Path], images: str | Path | None, fewest: int) -> Samples:
    """List a folder's images, whose classes are of no task, or those of the runs' splits.

    Raises:
        InputError: as for :func:`run_samples`.
    """
    if images is None:
        found = {name: run_samples(run, None, fewest) for name, run in runs.items()}
        return merge_samples(found)
    return folder_samples(images, fewest)


def _read(folder: Path) -> _Run:
    """Read a run; refuse one whose features are not the pretrained backbone's."""
    config = read_run(folder)
    if config.get("format") == GDPL_FORMAT:
        raise InputError(f"{folder} is a GDPL run, which adapts its backbone: export it by itself")
    members = [config]
    if config.get("format") == FOLDS_FORMAT:
        members = [read_json(folder / run["folder"] / CONFIG) for run in config["runs"]]
    for member in members:
        where = "trained low-rank adapters inside" if member.get("lora_layers") else None
        if member.get("backbone", {}).get("trained"):  # or random ones
            where = "has weights of its own for"
        elif member.get("changed"):
            where = "trained blocks of"
        if where is not None:
            raise InputError(
                f"{folder} {where} its backbone, so that no other run can share its features: "
                "export it by itself"
            )
    return _Run(folder, config, members[0])


def _check_same(first: _Run, other: _Run) -> None:
    """Refuse two runs that read the features of different backbones, inputs or views."""
    facts = [_facts(run.model) for run in (first, other)]
    for what in facts[0]:
        one, two = (fact[what] for fact in facts)
        if one != two:
            raise _differ(first.folder, other.folder, what, one, two)


def _check_preprocessing(first: Path, one: Trained, other: Path, two: Trained) -> None:
    a, b = one.preprocess.to_dict(), two.preprocess.to_dict()
    for name in a:
        if a[name] != b[name]:
            what = f"the preprocessing's {name} is"
            raise _differ(first, other, what, a[name], b[name])


def _differ(first: Path, other: Path, what: str, one: object, two: object) -> InputError:
    return InputError(
        f"{first} and {other} cannot share one pass through a backbone: {what} {one} and {two}. "
        "Export them by themselves."
    )


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    """Return what runs that share a backbone have alike, by how a message says it."""
    on, settings = config.get("backbone") or {}, config.get("adapt") or {}
    size = (config.get("preprocess") or settings).get("input_size")
    return {
        "their backbones are": on.get("name"),
        "the SHA-256 of their frozen weights is": on.get("fingerprint"),
        "their input_size is": size and list(size),
        "their `features` are": settings.get("features"),
        "their test-time augmentation is": settings.get("tta", "none"),
    }


def _member(model: nn.Module) -> AdaptedModel | FoldEnsemble:
    assert isinstance(model, AdaptedModel | FoldEnsemble)
    return model
