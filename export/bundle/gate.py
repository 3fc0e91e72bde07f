"""The parity check that every export must pass: unfolded, folded and ``model.onnx`` agree.

``model.onnx`` runs in ONNX Runtime on the CPU, which every machine has. What other files do is
checked in :mod:`fastadapt.export.bundle.verify_artefact`.
"""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt.errors import InputError, first_line

from ..features import Features
from ..graph_input import Inputs
from ..parity import RESIZED, Parity, compare, compare_tasks
from ..tasks import Task, side_by_side
from .material import Material

# One image, the smallest real batch, and an odd one: a batch that silently became fixed, or
# statistics taken over it, fail at one of them.
BATCHES = (1, 2, 5)
END_TO_END = "end to end"


def gate(file: Path, material: Material) -> list[Parity]:
    """Compare unfolded with folded, folded with ONNX Runtime, and the first with the last."""
    expected, classes, example = material.expected, material.classes, material.given.example
    tasks = material.trained.tasks
    parities = _check_resizing(material) if material.given.graph_input.resize else []
    for batch in BATCHES:
        folded = model_outputs(material.folded, example, batch)
        parities += compare_tasks(
            expected, folded, tasks, stage="folding", batch=batch, classes=classes
        )
    references = {"ONNX Runtime": folded, END_TO_END: expected}
    try:
        session = onnx_session(file)
    except InputError as error:
        return [*parities, Parity("ONNX Runtime", 0, len(expected), problems=(str(error),))]
    parities += compare_onnx(session, material.inputs, references, classes, tasks=tasks)
    return parities + _check_features(session, material)


def _check_features(session: Any, material: Material) -> list[Parity]:
    """Compare the second output, features, in the same way; nothing if there is none."""
    expected = material.features
    if expected is None:
        return []
    parities = []
    for batch in BATCHES:
        folded = model_outputs(Features(material.folded), material.given.example, batch)
        stage = "folding, features"
        parities.append(compare(expected, folded, stage=stage, batch=batch, classes=False))
    references = {"ONNX Runtime, features": folded, f"{END_TO_END}, features": expected}
    return parities + compare_onnx(session, material.inputs, references, classes=False, output=1)


def _check_resizing(material: Material) -> list[Parity]:
    """Compare the graph's way of resizing with the training's."""
    trained, expected = material.trained, material.expected
    normalized = trained.preprocess.normalize(material.given.pixels.training)
    training = model_outputs(trained.model, (normalized, *material.given.example[1:]), batch=8)
    return compare_tasks(
        training,
        expected,
        trained.tasks,
        stage="resizing",
        batch=len(expected),
        classes=material.classes,
        thresholds=RESIZED,
    )


@torch.no_grad()
def model_outputs(
    model: nn.Module, inputs: tuple[Tensor, ...], batch: int, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Run a model in batches of ``batch`` and return its outputs [samples, outputs]."""
    batches = zip(*(x.split(batch) for x in inputs), strict=True)
    parts = [side_by_side(model(*part)) for part in batches]
    return torch.cat(parts).to(dtype).numpy()


def model_outputs_fp64(model: nn.Module, inputs: tuple[Tensor, ...]) -> np.ndarray:
    """Run a model in fp64, without the rounding of its own dtype."""
    exact = copy.deepcopy(model).double()
    return model_outputs(exact, tuple(x.double() for x in inputs), batch=8, dtype=torch.float64)


def onnx_session(path: str | Path) -> Any:
    """Open an ONNX Runtime session on the CPU.

    Raises:
        InputError: ONNX Runtime cannot load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # where it prints its own retries
            return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        name = Path(path).name
        raise InputError(f"ONNX Runtime cannot load {name}: {first_line(error)}") from error


def run_onnx(session: Any, inputs: Inputs, batch: int, output: int | None = 0) -> np.ndarray:
    """Run a session in batches of ``batch`` and return one of its outputs [samples, ...].

    With ``None`` as the output all are returned, side by side.

    Raises:
        InputError: ONNX Runtime fails, at this batch size perhaps.
    """
    count = len(next(iter(inputs.values())))
    try:
        slices = (slice(start, start + batch) for start in range(0, count, batch))
        every = [session.run(None, {k: x[s] for k, x in inputs.items()}) for s in slices]
    except Exception as error:
        raise InputError(
            f"ONNX Runtime fails at batch size {batch}: {first_line(error)}"
        ) from error
    if output is None:
        return np.concatenate([np.concatenate(part) for part in zip(*every, strict=True)], axis=1)
    return np.concatenate([part[output] for part in every])


def compare_onnx(
    session: Any,
    inputs: Inputs,
    references: dict[str, np.ndarray],
    classes: bool,
    output: int = 0,
    tasks: tuple[Task, ...] = (),
) -> list[Parity]:
    """Compare a session's output with references, named by stage, at every batch size.

    Of several tasks every output is compared.
    """
    found: dict[str, list[Parity]] = {stage: [] for stage in references}
    for batch in BATCHES:
        try:
            outputs = run_onnx(session, inputs, batch, None if tasks else output)
        except InputError as error:
            for stage, reference in references.items():
                failed = Parity(stage, batch, len(reference), problems=(str(error),))
                found[stage].append(failed)
            continue
        for stage, reference in references.items():
            found[stage] += compare_tasks(
                reference, outputs, tasks, stage=stage, batch=batch, classes=classes
            )
    return [parity for parities in found.values() for parity in parities]
