"""One file of a bundle on this machine: run, compared with the trained model, and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastadapt.errors import InputError, first_line
from fastadapt.kernels.common.arithmetic import ceil_div

from ..artefact import FAILED, UNVERIFIED, VERIFIED, Artefact
from ..graph_input import Inputs
from ..parity import THRESHOLDS, Parity, check_problems, compare, compare_tasks
from ..precision.half import DTYPES
from ..runtimes import Runtime, RuntimeUnavailable, load_runtime
from ..settings import DEFAULT_BATCHES, Batches
from ..speed import throughput
from ..tasks import Task

LARGEST_INPUT = 2**31  # bytes of a batch


@dataclass(frozen=True)
class Reference:
    """The samples that a file is compared on, and the answers that are right.

    Attributes:
        inputs: what the files take, by name: [samples, ...], images first.
        expected: the trained model's outputs for them, fp32 [samples, outputs].
        classes: whether the outputs are classes.
        exact: computes ``expected`` in fp64; called where fp32's own rounding may matter.
        features: the trained model's features, where they are the files' second output.
        tasks: of the model, where it has several; the files have an output for each, and their
            columns stand side by side in ``expected``.
    """

    inputs: Inputs
    expected: np.ndarray
    classes: bool = True
    exact: Callable[[], np.ndarray] | None = None
    features: np.ndarray | None = None
    tasks: tuple[Task, ...] = ()


def verify_artefact(
    folder: str | Path,
    artefact: Artefact,
    reference: Reference,
    *,
    device: str = "auto",
    speed: bool = True,
) -> Artefact:
    """Run a file on this machine and compare, at every batch size that it was built for.

    Args:
        folder: that holds the file.
        artefact: what is known of it; its ``details["batch"]`` holds the batch sizes.
        reference: samples and expected outputs.
        device: as for :func:`fastadapt.export.runtimes.load_runtime`.
        speed: measure images per second, too, if it passes.

    Returns:
        The artefact with the status, parity and speed found here; unverified, with the reason,
        where it cannot run.
    """
    if artefact.path is None:
        return artefact
    try:
        runtime = load_runtime(Path(folder) / artefact.path, artefact.kind, device=device)
    except RuntimeUnavailable as error:
        return replace(artefact, status=UNVERIFIED, reason=str(error))
    except InputError as error:
        return replace(artefact, status=FAILED, reason=str(error))
    sizes = artefact.details.get("batch")
    batch = Batches(**sizes) if sizes else DEFAULT_BATCHES
    needed = batch.max * sum(x[0].nbytes for x in reference.inputs.values())
    if needed > LARGEST_INPUT:
        reason = (
            f"a batch of {batch.max} samples takes {needed / 1e9:.1f} GB, too much to be checked"
        )
        return replace(artefact, status=UNVERIFIED, reason=reason, parity=())
    parity = compare_runtime(runtime, reference, batch, precision=artefact.precision)
    problems = [f"at batch {p.batch}: {problem}" for p in parity for problem in p.problems]
    if reference.tasks:
        problems = check_problems(parity)  # that name the task
    if problems:
        return replace(artefact, status=FAILED, reason=problems[0], parity=tuple(parity))
    speeds = measure(runtime, reference.inputs, batch) if speed else {}
    result = replace(artefact, parity=tuple(parity), speed={runtime.name: speeds})
    if artefact.precision in DTYPES and artefact.kind == "onnx" and runtime.device == "cpu":
        reason = "ONNX Runtime computes it in fp32 on a CPU; that agrees"
        return replace(result, status=UNVERIFIED, reason=reason)
    return replace(result, status=VERIFIED, reason="")


def artefact_problems(artefacts: Sequence[Artefact]) -> list[str]:
    """Return why a bundle must be rejected: every file that ran and gave other outputs."""
    return [f"{a.path}: {a.reason}" for a in artefacts if a.status == FAILED]


def compare_runtime(
    runtime: Runtime, reference: Reference, batch: Batches, *, precision: str = "fp32"
) -> list[Parity]:
    """Compare a runtime with the trained model at MIN, OPT, MAX and an odd batch size.

    Where there are fewer samples than a batch holds, they are repeated. An fp32 result that is off
    by more than a tenth of what is allowed is compared with fp64 as well, if there is ``exact``:
    where the trained model's own fp32 rounding is the larger error, that decides.
    """
    limits, expected, exact = THRESHOLDS[precision], reference.expected, reference.exact
    parities = []
    for size in batch.checked:
        count = ceil_div(len(expected), size) * size
        tiled = [_repeat(x, count) for x in reference.inputs.values()]
        try:
            parts = [
                runtime.outputs(*(x[start : start + size] for x in tiled))
                for start in range(0, count, size)
            ]
            given = parts if reference.tasks else [part[:1] for part in parts]
            outputs = np.concatenate([_rows(list(part)) for part in zip(*given, strict=True)], 1)
            features = None if reference.features is None else _rows([part[1] for part in parts])
        # Outputs that are missing, or are no rows of numbers.
        except (InputError, TypeError, ValueError, IndexError) as error:
            parities.append(Parity(runtime.name, size, count, problems=(first_line(error),)))
            continue

        def against(truth, stage, size=size, outputs=outputs):
            return compare_tasks(
                _repeat(truth, len(outputs)),
                outputs,
                reference.tasks,
                stage=stage,
                batch=size,
                classes=reference.classes,
                thresholds=limits,
            )

        found = against(expected, runtime.name)
        close = all(p.error is not None and p.error <= limits.error / 10 for p in found)
        if precision == "fp32" and exact is not None and not close:
            truth = against(exact(), f"{runtime.name}, against fp64")
            found = [
                exact_p if exact_p.passed and not p.passed else p
                for p, exact_p in zip(found, truth, strict=True)
            ]
        parities += found
        if features is not None and reference.features is not None:
            stage = f"{runtime.name}, features"
            wanted = _repeat(reference.features, len(features))
            parities.append(
                compare(wanted, features, stage=stage, batch=size, classes=False, thresholds=limits)
            )
    return parities


def _rows(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([part.reshape(len(part), -1) for part in parts]).astype(np.float64)


def measure(runtime: Runtime, inputs: Inputs, batch: Batches) -> dict[str, float]:
    """Measure images per second by batch size, with tensors in the runtime device's memory."""
    speeds = {}
    for size in sorted({batch.min, batch.opt, batch.max}):
        given = [torch.from_numpy(_repeat(x, size)).to(runtime.device) for x in inputs.values()]

        def call(given=given):
            runtime(*given)
            if runtime.device == "cuda":
                torch.cuda.synchronize()

        speeds[str(size)] = throughput(call, size)
    return speeds


def _repeat(values: np.ndarray, count: int) -> np.ndarray:
    return np.resize(values, (count, *values.shape[1:]))
