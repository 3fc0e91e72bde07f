"""``fastadapt verify``: a bundle's files, and the gate's comparison again, on any machine.

Verifying a bundle needs what runs it and the golden samples beside it; neither the backbone nor
the run that it came from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fastadapt.errors import InputError
from fastadapt.files import read_json, read_tensors, write_json

from .artefact import FAILED, VERIFIED, Artefact, rate
from .build import artefact_problems, rebuild_artefact, verify_artefact
from .graph_input import GraphInput
from .manifest import (
    GOLDEN,
    MANIFEST,
    MODEL,
    check_accepted,
    check_files,
    environment,
    list_files,
    read_manifest,
    version_changes,
)
from .onnx_check import Inputs
from .parity import Parity


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_bundle` found.

    Attributes:
        bundle: the folder.
        manifest: the bundle's.
        artefacts: as they did here; what cannot run here is ``"unverified"`` and says why.
        notes: packages of other versions than the bundle was made with.
    """

    bundle: Path
    manifest: dict[str, Any]
    artefacts: tuple[Artefact, ...]
    notes: tuple[str, ...]

    @property
    def parities(self) -> tuple[Parity, ...]:
        """Of every file and batch size; their stage names the file."""
        return tuple(
            replace(parity, stage=f"golden, {artefact.path}")
            for artefact in self.artefacts
            for parity in artefact.parity
        )

    @property
    def passed(self) -> bool:
        """Whether something ran, and nothing that ran gave other outputs."""
        statuses = {artefact.status for artefact in self.artefacts}
        return VERIFIED in statuses and FAILED not in statuses

    @property
    def problems(self) -> list[str]:
        """What failed, or that nothing ran; empty if it passed."""
        failed = artefact_problems(self.artefacts)
        if not failed and not self.passed:
            return [f"{a.path}: {a.reason}" for a in self.artefacts] or ["it holds nothing to run"]
        return failed

    @property
    def images_per_second(self) -> dict[int, float]:
        """Of ``model.onnx`` on this machine, by batch size."""
        found = next((a.speed for a in self.artefacts if a.path == MODEL), {})
        return {int(batch): value for speeds in found.values() for batch, value in speeds.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "passed": self.passed,
            "files": len(self.manifest["files"]),
            "notes": list(self.notes),
            "artefacts": [artefact.to_dict() for artefact in self.artefacts],
            "environment": environment(),
        }


def verify_bundle(
    bundle: str | Path, *, speed: bool = True, rebuild: bool = False, console: Console | None = None
) -> Verification:
    """Checks a bundle's files and compares every file that runs here on its golden samples.

    Args:
        bundle: a folder that ``fastadapt export`` wrote.
        speed: measure images per second, too (a few seconds per file).
        rebuild: build TensorRT engines that cannot run here anew, for this machine, and put them
            into the bundle.
        console: where building shows its progress.

    Returns:
        The result; whether the outputs agree is its ``passed``.

    Raises:
        InputError: no bundle, a newer or rejected one, a file that is missing, truncated or
            changed (it is named), an engine that cannot be rebuilt.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    check_accepted(bundle, manifest)
    check_files(bundle, manifest)
    tensors, _ = read_tensors(bundle / GOLDEN)
    names = [value["name"] for value in manifest["model"]["inputs"]]
    inputs = golden_inputs(tensors, names, manifest["preprocessing"])
    expected, classes = tensors["expected"].numpy(), bool(manifest["labels"])
    artefacts = []
    for row in manifest["artefacts"]:
        known = Artefact.from_dict(row)
        if not known.runnable:
            continue
        found = verify_artefact(bundle, known, inputs, expected, classes=classes, speed=speed)
        if rebuild and found.kind.startswith("tensorrt") and not found.parity:
            if not torch.cuda.is_available():
                raise InputError(f"--rebuild needs the GPU that {found.path} shall run on")
            found = rebuild_artefact(
                bundle, found, inputs, expected, classes=classes, console=console
            )
            _replace(bundle, row, found)
        artefacts.append(found)
    return Verification(bundle, manifest, tuple(artefacts), tuple(version_changes(manifest)))


def _replace(bundle: Path, row: dict[str, Any], artefact: Artefact) -> None:
    """Puts a rebuilt engine into the manifest, and the hashes of its files."""
    manifest = read_json(bundle / MANIFEST)
    manifest["artefacts"] = [
        artefact.to_dict() if other["path"] == row["path"] else other
        for other in manifest["artefacts"]
    ]
    hashes = list_files(bundle)
    manifest["files"] |= {name: hashes[name] for name in artefact.files}
    write_json(bundle / MANIFEST, manifest)


def golden_inputs(
    tensors: dict[str, Any], names: list[str], preprocessing: dict[str, Any]
) -> Inputs:
    """What a bundle's model takes, ``names``, of its golden samples.

    Raises:
        InputError: an input, or the expected output, is not among them.
    """
    for name in (*names, "expected"):
        if name not in tensors:
            raise InputError(f"{GOLDEN} lacks the model's input {name!r}: export the run again")
    images, *others = names
    graph_input = GraphInput.from_dict(preprocessing)
    return {
        images: graph_input.array(tensors[images].numpy()),
        **{name: tensors[name].numpy() for name in others},
    }


def artefact_table(artefacts: Iterable[Artefact]) -> Table:
    """What runs here, and what does not, for the terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("file", "for", "precision", "here", "why"):
        table.add_column(column)
    marks = {VERIFIED: "[green]✓[/] verified", FAILED: "[red]✗[/] failed"}
    for artefact in artefacts:
        status = marks.get(artefact.status, artefact.status)
        table.add_row(artefact.path, artefact.kind, artefact.precision, status, artefact.reason)
    return table


def speed_table(artefacts: Iterable[Artefact]) -> Table:
    """Images per second, for the terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("file")
    table.add_column("runtime")
    table.add_column("batch", justify="right")
    table.add_column("images/s", justify="right")
    for artefact in artefacts:
        for runtime, speeds in artefact.speed.items():
            for batch, speed in speeds.items():
                table.add_row(artefact.path, runtime, batch, rate(speed))
    return table
