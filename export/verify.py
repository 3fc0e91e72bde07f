"""``fastadapt verify``: a bundle's files, and the gate's comparison again, on any machine.

Verifying a bundle needs what runs it and the golden samples beside it; neither the backbone nor
the run that it came from.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from fastadapt.errors import InputError
from fastadapt.export.artefact import FAILED, VERIFIED, Artefact
from fastadapt.export.graph_input import GraphInput
from fastadapt.export.manifest import (
    GOLDEN,
    MODEL,
    check_files,
    environment,
    read_manifest,
    version_changes,
)
from fastadapt.export.parity import Parity, compare
from fastadapt.files import read_tensors

Inputs = dict[str, np.ndarray]  # what a model takes, by name: [samples, ...], images first

# One image, the smallest real batch, and an odd one: a batch that silently became fixed, or
# statistics taken over it, fail on one of them.
BATCHES = (1, 2, 5)
SPEED_BATCHES = (1, 16)


def onnx_session(path: str | Path) -> Any:
    """An ONNX Runtime session on the CPU. Raises InputError if it cannot load the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        name = Path(path).name
        raise InputError(f"ONNX Runtime cannot load {name}: {_first_line(error)}") from error


def run_onnx(session: Any, inputs: Inputs, batch: int) -> np.ndarray:
    """A session's outputs [samples, outputs], in batches of ``batch``.

    Raises:
        InputError: ONNX Runtime fails, at this batch size perhaps.
    """
    count = len(next(iter(inputs.values())))
    try:
        parts = [
            session.run(None, {name: x[start : start + batch] for name, x in inputs.items()})[0]
            for start in range(0, count, batch)
        ]
    except Exception as error:
        raise InputError(
            f"ONNX Runtime fails at batch size {batch}: {_first_line(error)}"
        ) from error
    return np.concatenate(parts)


def compare_onnx(
    session: Any, inputs: Inputs, references: dict[str, np.ndarray], classes: bool
) -> list[Parity]:
    """A session against references (by stage), at every batch size of the gate."""
    parities = []
    for batch in BATCHES:
        try:
            outputs = run_onnx(session, inputs, batch)
        except InputError as error:
            failed = [
                Parity(stage, batch, len(reference), problems=(str(error),))
                for stage, reference in references.items()
            ]
            parities.extend(failed)
            continue
        for stage, reference in references.items():
            parities.append(compare(reference, outputs, stage=stage, batch=batch, classes=classes))
    return sorted(parities, key=lambda parity: list(references).index(parity.stage))


def throughput(call: Callable[[], Any], batch: int, seconds: float = 1.0) -> float:
    """Images per second of a function that handles ``batch`` images; the median of its calls."""
    call()
    times: list[float] = []
    begin = start = time.perf_counter()
    while start < begin + seconds or len(times) < 3:
        call()
        end = time.perf_counter()
        times.append(end - start)
        start = end
    return batch / float(np.median(times))


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
        return tuple(parity for artefact in self.artefacts for parity in artefact.parity)

    @property
    def passed(self) -> bool:
        """Whether something ran, and nothing that ran gave other outputs."""
        statuses = {artefact.status for artefact in self.artefacts}
        return VERIFIED in statuses and FAILED not in statuses

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


def verify_bundle(bundle: str | Path, *, speed: bool = True, rebuild: bool = False) -> Verification:
    """Checks a bundle's files and repeats the gate's comparison on its golden samples.

    Args:
        bundle: a folder that ``fastadapt export`` wrote.
        speed: measure images per second, too (a few seconds).
        rebuild: build engines that cannot run here anew, for this machine, and put them into the
            bundle.

    Returns:
        The result; whether the outputs agree is its ``passed``.

    Raises:
        InputError: no bundle, a newer or rejected one, a file that is missing, truncated or
            changed (it is named), a model that ONNX Runtime cannot load.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    if not manifest["accepted"]:
        raise InputError(f"{bundle} was rejected when it was made: {manifest['problems'][0]}")
    check_files(bundle, manifest)
    tensors, _ = read_tensors(bundle / GOLDEN)
    artefacts = []
    for row in manifest["artefacts"]:
        artefact = Artefact.from_dict(row)
        if artefact.runnable:
            artefacts.append(_verify(bundle, artefact, tensors, manifest, speed))
    return Verification(bundle, manifest, tuple(artefacts), tuple(version_changes(manifest)))


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


def _verify(
    bundle: Path,
    artefact: Artefact,
    tensors: dict[str, Any],
    manifest: dict[str, Any],
    speed: bool,
) -> Artefact:
    session = onnx_session(bundle / artefact.path)
    names = [value.name for value in session.get_inputs()]
    inputs, expected = golden_inputs(tensors, names, manifest["preprocessing"]), tensors["expected"]
    parities = compare_onnx(session, inputs, {"golden": expected}, bool(manifest["labels"]))
    passed = all(parity.passed for parity in parities)
    return replace(
        artefact,
        status=VERIFIED if passed else FAILED,
        parity=tuple(parities),
        speed=onnx_speed(session, inputs) if speed and passed else {},
    )


def onnx_speed(session: Any, inputs: Inputs) -> dict[str, dict[str, float]]:
    """Images per second, by provider and batch size."""
    speeds = {}
    for batch in SPEED_BATCHES:
        repeated = {name: np.resize(x, (batch, *x.shape[1:])) for name, x in inputs.items()}
        call = functools.partial(run_onnx, session, repeated, batch)
        speeds[str(batch)] = throughput(call, batch)
    return {"ONNX Runtime, CPU": speeds}


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
                table.add_row(artefact.path, runtime, batch, f"{speed:.3g}")
    return table


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
