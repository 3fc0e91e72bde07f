"""``fastadapt verify``: a bundle's files are whole, and answer as the trained model did.

Every file that runs on this machine is run on the golden samples and compared with the outputs
that the trained model gave for them. That needs neither the backbone nor the run that the bundle
was made from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastadapt.errors import InputError
from fastadapt.files import read_json, read_tensors, seal, write_json

from ..artefact import FAILED, UNVERIFIED, VERIFIED, Artefact
from ..parity import Parity
from ..speed import format_rate
from ..tasks import tasks_of
from .build import rebuild_artefact
from .consistency import check_consistency
from .golden import (
    EXPECTED,
    check_golden_pixels,
    golden_features,
    golden_inputs,
    join_expected,
)
from .manifest import (
    GOLDEN,
    MANIFEST,
    MODEL,
    SEALED,
    check_accepted,
    check_files,
    environment,
    list_files,
    read_manifest,
    version_changes,
)
from .measured import add_rows, measured_rows
from .signature import check_signature
from .trust import GUARDED, made_here, remember_bundle, why_not_run
from .verify_artefact import Reference, artefact_problems, verify_artefact


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_bundle` found.

    Attributes:
        bundle: the folder.
        manifest: of the bundle.
        artefacts: with their status here; what cannot run here is ``"unverified"``, with a reason.
        notes: packages of other versions than the bundle was made with.
    """

    bundle: Path
    manifest: dict[str, Any]
    artefacts: tuple[Artefact, ...]
    notes: tuple[str, ...]

    @property
    def parities(self) -> tuple[Parity, ...]:
        """The comparisons of every file at every batch size; their stage names the file."""
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
        """The reasons why it did not pass: what failed, or that nothing ran."""
        failed = artefact_problems(self.artefacts)
        if not failed and not self.passed:
            return [f"{a.path}: {a.reason}" for a in self.artefacts] or ["it holds nothing to run"]
        return failed

    @property
    def images_per_second(self) -> dict[int, float]:
        """The speed of ``model.onnx`` on this machine, by batch size."""
        found = next((a.speed for a in self.artefacts if a.path == MODEL), {})
        return {int(batch): value for speeds in found.values() for batch, value in speeds.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON, for ``fastadapt verify --json``."""
        return {
            "bundle": str(self.bundle),
            "passed": self.passed,
            "files": len(self.manifest["files"]),
            "notes": list(self.notes),
            "artefacts": [artefact.to_dict() for artefact in self.artefacts],
            "environment": environment(),
        }


def verify_bundle(
    bundle: str | Path,
    *,
    speed: bool = True,
    rebuild: bool = False,
    measure: bool = False,
    trust: bool = False,
    key: str | Path | None = None,
    console: Console | None = None,
) -> Verification:
    """Check a bundle's files, and compare every file that runs here on its golden samples.

    Args:
        bundle: a folder that ``fastadapt export`` wrote.
        speed: measure images per second, too (a few seconds per file).
        rebuild: build TensorRT engines that cannot run here anew, for this machine, and put them
            into the bundle.
        measure: keep this machine's speeds in the bundle, beside the manifest; ``load`` chooses
            the fastest file by them.
        trust: run native code (.pt2, engines) and programs (.pte, .tflite, .mlpackage) of a bundle
            not made on this machine.
        key: file of the maker's public key; a bundle that was signed with it is trusted, any
            other refused.
        console: where the progress of building is shown.

    Returns:
        The result; its ``passed`` says whether the outputs agree.

    Raises:
        InputError: the folder is no bundle, or a newer or rejected one; a file is missing,
            truncated or changed (it is named); parts of the bundle contradict each other;
            preprocessing makes other pixels than at export; an engine cannot be rebuilt; the
            bundle was not signed with ``key``.
    """
    bundle = Path(bundle)
    if measure and not speed:
        raise InputError("`measure` keeps speeds: leave out `speed=False`")
    if key is not None:
        check_signature(bundle, key)
        trust = True
    manifest = read_manifest(bundle)
    check_accepted(bundle, manifest)
    check_files(bundle, manifest)
    check_consistency(bundle, manifest)
    tasks = tasks_of(manifest)
    tensors = join_expected(read_tensors(bundle / GOLDEN)[0], tasks)
    names = [value["name"] for value in manifest["model"]["inputs"]]
    inputs = golden_inputs(tensors, names, manifest["preprocessing"])
    reference = Reference(
        inputs,
        tensors[EXPECTED].numpy(),
        classes=bool(manifest["labels"] or tasks),
        features=None if tasks else golden_features(tensors, manifest["model"].get("outputs", [])),
        tasks=tasks,
    )
    changes = version_changes(manifest)
    same = not any(note.startswith(("pillow", "timm")) for note in changes)
    pixels = check_golden_pixels(bundle, manifest, tensors[names[0]], same)
    here, artefacts = made_here(manifest), []
    for row in manifest["artefacts"]:
        known = Artefact.from_dict(row)
        if not known.runnable:
            continue
        why_not = why_not_run(known, manifest, trust)
        if why_not is None:
            found = verify_artefact(bundle, known, reference, speed=speed)
        else:
            found = replace(known, status=UNVERIFIED, reason=why_not, parity=())
        if rebuild and found.kind.startswith("tensorrt") and not found.parity:
            if not torch.cuda.is_available():
                raise InputError(f"`rebuild` needs the GPU that {found.path} is to run on")
            found = rebuild_artefact(bundle, found, reference, console)
            _replace(bundle, row, found, here)
        artefacts.append(found)
    if measure:
        add_rows(bundle, measured_rows(artefacts, read_json(bundle / MANIFEST)["files"]))
    notes = (*changes, *([pixels] if pixels else []))
    return Verification(bundle, manifest, tuple(artefacts), notes)


def _replace(bundle: Path, row: dict[str, Any], artefact: Artefact, here: bool) -> None:
    """Put a rebuilt engine and the hashes of its files into the manifest.

    If the bundle was made here (``here``), or now holds no native code from elsewhere, the new
    manifest counts as made here.
    """
    manifest = read_json(bundle / MANIFEST)
    manifest["artefacts"] = [
        artefact.to_dict() if other["path"] == row["path"] else other
        for other in manifest["artefacts"]
    ]
    hashes = list_files(bundle)
    manifest["files"] |= {name: hashes[name] for name in artefact.files}
    if "measured" in manifest:
        others = [row for row in manifest["measured"] if row["file"] != artefact.path]
        manifest["measured"] = others + measured_rows([artefact], manifest["files"])
    if manifest["schema"] >= SEALED:
        manifest = seal(manifest)
    write_json(bundle / MANIFEST, manifest)
    foreign = [a for a in manifest["artefacts"] if a["kind"] in GUARDED and a["path"]]
    if here or foreign == [artefact.to_dict()]:
        remember_bundle(manifest)


def artefact_table(artefacts: Iterable[Artefact]) -> Table:
    """Make a table of the files and their status here, for the terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("file", "for", "precision", "here", "why"):
        table.add_column(column)
    marks = {VERIFIED: "[green]✓[/] verified", FAILED: "[red]✗[/] failed"}
    for artefact in artefacts:
        status = marks.get(artefact.status, artefact.status)
        reason = escape(artefact.reason)
        table.add_row(artefact.path, artefact.kind, artefact.precision, status, reason)
    return table


def speed_table(artefacts: Iterable[Artefact]) -> Table:
    """Make a table of images per second, for the terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("file")
    table.add_column("runtime")
    table.add_column("batch", justify="right")
    table.add_column("images/s", justify="right")
    for artefact in artefacts:
        for runtime, speeds in artefact.speed.items():
            for batch, speed in speeds.items():
                table.add_row(artefact.path, runtime, batch, format_rate(speed))
    return table
