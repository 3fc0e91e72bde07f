"""What a new bundle's manifest says of the model, its tasks, its files and the comparisons."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..artefact import FOLDERS, Artefact
from ..parity import Parity, Thresholds
from .engine_options import EngineOptions
from .golden import GoldenSamples
from .manifest import (
    FORMAT,
    GOLDEN,
    LABELS,
    MODEL,
    SCHEMA,
    SEALED,
    TASKS,
    environment,
    labels_name,
    list_files,
)
from .material import Material
from .measured import measured_rows
from .quality import quality_of
from .trained import Trained, temperatures


@dataclass(frozen=True)
class Checked:
    """What an export compared.

    Attributes:
        parities: of the gate.
        artefacts: the files that run.
        problems: why the bundle is rejected; empty if it is not.
    """

    parities: tuple[Parity, ...]
    artefacts: tuple[Artefact, ...]
    problems: tuple[str, ...]


def labels_of(trained: Trained) -> dict[str, list[str]]:
    """Return the class names that each file of them is to hold: one, or one for each task."""
    if not trained.parts:
        return {LABELS: trained.labels}
    return {labels_name(part.name): part.trained.labels for part in trained.parts}


def describe(
    folder: Path,
    material: Material,
    wanted: EngineOptions,
    described: dict[str, Any],
    checked: Checked,
    golden: GoldenSamples,
    images: list[str],
) -> dict[str, Any]:
    """Make the manifest, with the files that are in the folder so far.

    Args:
        folder: of the bundle.
        material: what the export worked with.
        wanted: the files that were built beside the fp32 ONNX file.
        described: what ``model.onnx`` is, as :func:`export_onnx` says.
        checked: what was compared.
        golden: the golden samples.
        images: names of their files.
    """
    trained, files = material.trained, list_files(folder)
    return {
        "format": FORMAT,
        "schema": _schema(trained, checked.artefacts),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "accepted": not checked.problems,
        "problems": list(checked.problems),
        "model": {"file": MODEL, **described},
        "labels": trained.labels,
        **({} if trained.parts else _of_model(trained)),
        "tasks": _tasks(trained, described),
        "preprocessing": material.given.graph_input.to_dict(),
        "backbone": {"name": trained.backbone, "pretrained_cfg": trained.pretrained_cfg},
        "source": trained.source,
        "licences": {"weights": trained.pretrained_cfg.get("license"), "data": None},
        "golden": {
            "file": GOLDEN,
            "samples": len(images),
            "origin": golden.origin,
            "images": images,
        },
        "compared_on": material.samples.origin,
        "limits": {
            "int8_budget": wanted.int8_budget if wanted.int8 else None,
            "fp8_budget": wanted.fp8_budget if wanted.fp8 else None,
        },
        "environment": environment(),
        "fold_report": material.fold_report.to_dict(),
        "parity": [parity.to_dict() for parity in checked.parities],
        "thresholds": asdict(Thresholds()),
        "artefacts": [artefact.to_dict() for artefact in checked.artefacts],
        "measured": measured_rows(checked.artefacts, files),
        "files": files,
    }


def _schema(trained: Trained, artefacts: tuple[Artefact, ...]) -> int:
    """Return the oldest schema that can say what the bundle holds: more versions read it."""
    if any(artefact.kind in FOLDERS and artefact.path is not None for artefact in artefacts):
        return SCHEMA
    return TASKS if trained.parts else SEALED


def _of_model(trained: Trained) -> dict[str, Any]:
    """Describe how a model's logits become classes, and how good it is."""
    return {
        "decision": trained.decision.to_dict(),
        "calibration": temperatures(trained.model),
        "quality": quality_of(trained.quality),
    }


def _tasks(trained: Trained, described: dict[str, Any]) -> list[dict[str, Any]]:
    """Describe the graph's outputs."""
    if trained.parts:
        return [
            {
                "name": part.name,
                "output": output["name"],
                "kind": "classification",
                "labels": part.trained.labels,
                **_of_model(part.trained),
                "source": part.trained.source,
            }
            for part, output in zip(trained.parts, described["outputs"], strict=True)
        ]
    first, *others = described["outputs"]
    kind = "classification" if trained.labels else "features"
    tasks = [{"output": first["name"], "kind": kind, "labels": trained.labels}]
    return tasks + [{"output": o["name"], "kind": "features", "labels": []} for o in others]
