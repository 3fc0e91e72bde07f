"""The gate's first run of ``model.onnx``: ONNX Runtime on the CPU, which every machine has."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastadapt.errors import InputError

from ..runtimes import first_line
from .parity import Parity, compare

Inputs = dict[str, np.ndarray]  # what a model takes, by name: [samples, ...], images first

# One image, the smallest real batch, and an odd one: a batch that silently became fixed, or
# statistics taken over it, fail on one of them.
BATCHES = (1, 2, 5)


def onnx_session(path: str | Path) -> Any:
    """An ONNX Runtime session on the CPU. Raises InputError if it cannot load the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        name = Path(path).name
        raise InputError(f"ONNX Runtime cannot load {name}: {first_line(error)}") from error


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
            f"ONNX Runtime fails at batch size {batch}: {first_line(error)}"
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
