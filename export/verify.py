"""The gate's comparisons, and ``fastadapt verify``: the same comparison again, anywhere.

Verifying a bundle needs ONNX Runtime, the model and the golden samples beside it; neither the
backbone nor the run that it came from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from fastadapt.errors import InputError
from fastadapt.files import read_json, read_tensors, sha256_file

Inputs = dict[str, np.ndarray]  # what a model takes, by name: fp32 [samples, ...], images first

FORMAT = "fastadapt-bundle"
SCHEMA = 1
MANIFEST, MODEL, GOLDEN = "manifest.json", "model.onnx", "golden.safetensors"
# One image, the smallest real batch, and an odd one: a batch that silently became fixed, or
# statistics taken over it, fail on one of them.
BATCHES = (1, 2, 5)
SPEED_BATCHES = (1, 16)


class GateError(InputError):
    """A model whose outputs differ from the reference; the command line's exit code is not 0."""


@dataclass(frozen=True)
class Thresholds:
    """What passes, for models in fp32.

    Attributes:
        error: of the spread. fp32 arithmetic in another order gives 1e-6 to 1e-4 on the backbones
            that are tested; a wrong weight, scale or normalisation 1e-2 and more. At 1e-3 a
            logit moves by a thousandth of how much it varies from image to image.
        cosine: the smallest of all samples. An error within its limit implies it; it is stated
            because other tools report it, so that results can be compared.
        spread: of the outputs' largest value. Below 1e-4 fp32 rounding is itself 1e-3 of the
            spread: the model answers every image alike, and agreement says nothing.
    """

    error: float = 1e-3
    cosine: float = 0.9999
    spread: float = 1e-4


@dataclass(frozen=True)
class Parity:
    """How well two models agree on the same samples; made by :func:`compare`.

    Attributes:
        stage: which two models.
        batch: batch size of the candidate; 0 if unknown.
        samples: how many.
        error: largest absolute difference, over the spread of the reference.
        cosine: smallest cosine of a sample's two outputs; outputs nearer to the origin than a
            tenth of the spread have no direction to speak of and are left out.
        top1: share of samples with the same highest output, near ties left out; ``None`` with
            fewer than two classes or nothing but near ties.
        near_ties: samples whose two highest outputs are closer than the error that is allowed.
        spread: how much the reference varies from sample to sample, over its largest value.
        problems: why it fails; empty if it passes.
    """

    stage: str
    batch: int
    samples: int
    error: float | None = None
    cosine: float | None = None
    top1: float | None = None
    near_ties: int | None = None
    spread: float | None = None
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "problems": list(self.problems), "passed": self.passed}


def compare(
    reference: Any,
    candidate: Any,
    *,
    stage: str = "",
    batch: int = 0,
    classes: bool = True,
    thresholds: Thresholds = Thresholds(),
) -> Parity:
    """Compares the outputs of two models on the same samples.

    The scale of the error is the *spread* of the reference: the standard deviation of every output
    over the samples, root mean square over the outputs. It measures what the outputs tell the
    samples apart by. The largest value would not do: a common offset, or a model that answers
    every image nearly alike, makes any error look small beside it.

    Args:
        reference, candidate: [samples, outputs], arrays or CPU tensors.
        stage, batch: go into the result.
        classes: whether the outputs are classes, so that the highest one means something.
        thresholds: what passes.

    Returns:
        A :class:`Parity`; NaN or infinity in either, or outputs that do not vary, never pass.
    """
    a = np.asarray(reference, dtype=np.float64)
    b = np.asarray(candidate, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2:
        return Parity(stage, batch, len(a), problems=(f"shapes {a.shape} and {b.shape} differ",))
    for name, values in (("reference", a), ("candidate", b)):
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).any(axis=1).sum())
            reason = f"the {name} gives NaN or infinity for {bad} of {len(a)} samples"
            return Parity(stage, batch, len(a), problems=(reason,))

    tiny = np.finfo(np.float64).tiny
    spread = math.sqrt(a.var(axis=0).mean())
    error = np.abs(a - b).max() / max(spread, tiny)
    relative_spread = spread / max(np.abs(a).max(), tiny)
    length = np.linalg.norm(a, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(length * np.linalg.norm(b, axis=1), tiny)
    cosine = cosines[length >= 0.1 * spread * math.sqrt(a.shape[1])].min()
    top1, near_ties = None, None
    if classes and a.shape[1] > 1:
        highest = np.sort(a, axis=1)
        # Each of the two may move by the error that is allowed.
        decided = highest[:, -1] - highest[:, -2] > 2 * thresholds.error * spread
        near_ties = int((~decided).sum())
        if decided.any():
            top1 = float((a.argmax(axis=1) == b.argmax(axis=1))[decided].mean())

    problems = []
    if not relative_spread >= thresholds.spread:
        problems.append(
            f"the reference varies by only {relative_spread:.1e} of its largest value from sample "
            f"to sample (at least {thresholds.spread:.0e} is needed): agreement says nothing"
        )
    elif not error <= thresholds.error:
        problems.append(f"error {error:.1e} of the spread (at most {thresholds.error:.0e})")
    if not cosine >= thresholds.cosine:
        problems.append(f"cosine {cosine:.6f} (at least {thresholds.cosine})")
    if top1 is not None and top1 < 1:
        problems.append(f"another class for {1 - top1:.1%} of the samples that are no near ties")
    return Parity(
        stage,
        batch,
        len(a),
        float(error),
        float(cosine),
        top1,
        near_ties,
        float(relative_spread),
        tuple(problems),
    )


def check_problems(parities: Iterable[Parity]) -> list[str]:
    """Every reason why the gate stays shut, with its stage."""
    return [
        f"{parity.stage} at batch {parity.batch}: {problem}"
        for parity in parities
        for problem in parity.problems
    ]


def parity_table(parities: Iterable[Parity]) -> Table:
    """One row per stage and batch size, for the terminal."""
    limits = Thresholds()
    table = Table(
        box=box.SIMPLE_HEAD,
        title="parity",
        title_justify="left",
        caption=f"error at most {limits.error:.0e} of the spread, cosine at least {limits.cosine}",
        caption_justify="left",
    )
    table.add_column("stage")
    for column in ("batch", "error", "cosine", "top-1", "near ties", "spread", ""):
        table.add_column(column, justify="right")
    for p in parities:
        table.add_row(
            p.stage,
            str(p.batch),
            "–" if p.error is None else f"{p.error:.1e}",
            "–" if p.cosine is None else f"{p.cosine:.6f}",
            "–" if p.top1 is None else f"{p.top1:.0%}",
            "–" if p.near_ties is None else f"{p.near_ties}/{p.samples}",
            "–" if p.spread is None else f"{p.spread:.1e}",
            "[green]✓[/]" if p.passed else "[red]✗[/]",
        )
    return table


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
    """A session's outputs [samples, outputs] for fp32 inputs, in batches of ``batch``.

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
        parities: of every batch size.
        images_per_second: of ONNX Runtime on this CPU, by batch size.
        manifest: the bundle's.
    """

    bundle: Path
    parities: tuple[Parity, ...]
    images_per_second: dict[int, float]
    manifest: dict[str, Any]

    @property
    def passed(self) -> bool:
        return all(parity.passed for parity in self.parities)


def verify_bundle(bundle: str | Path, *, speed: bool = True) -> Verification:
    """Checks a bundle's files and repeats the gate's comparison on its golden samples.

    Args:
        bundle: a folder that ``fastadapt export`` wrote.
        speed: measure images per second, too (a few seconds).

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
    session = onnx_session(bundle / MODEL)
    names = [value.name for value in session.get_inputs()]
    inputs = golden_inputs(tensors, names, manifest["preprocessing"])
    classes = bool(manifest["labels"])
    expected = tensors["expected"].numpy()
    parities = compare_onnx(session, inputs, {"golden": expected}, classes)
    speeds = {}
    if speed and all(parity.passed for parity in parities):
        for batch in SPEED_BATCHES:
            repeated = {k: np.resize(x, (batch, *x.shape[1:])) for k, x in inputs.items()}
            speeds[batch] = throughput(
                lambda x=repeated, batch=batch: run_onnx(session, x, batch), batch
            )
    return Verification(bundle, tuple(parities), speeds, manifest)


def golden_inputs(
    tensors: dict[str, Any], names: list[str], preprocessing: dict[str, Any]
) -> Inputs:
    """What a bundle's model takes, ``names``, of its golden samples.

    Raises:
        InputError: an input is not among them.
    """
    for name in names:
        if name not in tensors:
            raise InputError(f"{GOLDEN} lacks the model's input {name!r}: export the run again")
    images, *others = names
    return {
        images: model_input(tensors[images].numpy(), preprocessing),
        **{name: tensors[name].numpy() for name in others},
    }


def model_input(images: np.ndarray, preprocessing: dict[str, Any]) -> np.ndarray:
    """uint8 [B, 3, H, W] to the fp32 input of a bundle's model, as its manifest says."""
    values = images.astype(np.float32) / np.float32(255)
    if preprocessing["normalization_in_graph"]:
        return values
    shape = (-1, *(1,) * (images.ndim - 2))
    mean = np.asarray(preprocessing["mean"], np.float32).reshape(shape)
    return (values - mean) / np.asarray(preprocessing["std"], np.float32).reshape(shape)


def read_manifest(bundle: Path) -> dict[str, Any]:
    """Raises InputError if the folder is no bundle, or one that this version cannot read."""
    if not (bundle / MANIFEST).is_file():
        what = f"has no {MANIFEST}" if bundle.is_dir() else "is not there"
        raise InputError(f"{bundle} is no bundle: it {what}. fastadapt export RUN makes one.")
    manifest = read_json(bundle / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{bundle / MANIFEST} is no manifest of a fastadapt bundle")
    schema = manifest.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise InputError(
            f"{bundle} was written by a newer fastadapt (schema {schema}, this one reads up to "
            f"{SCHEMA}): update fastadapt"
        )
    for key in ("files", "labels", "preprocessing", "accepted", "problems"):
        if key not in manifest:
            raise InputError(f"{bundle / MANIFEST} lacks the key {key!r}: copy the bundle again")
    return manifest


def check_files(bundle: Path, manifest: dict[str, Any]) -> None:
    """Raises InputError naming the first file that is missing, truncated or changed."""
    for name, recorded in manifest["files"].items():
        file = bundle / name
        if not file.is_file():
            raise InputError(f"{file} is missing: copy the bundle again")
        size = file.stat().st_size
        if size != recorded["bytes"]:
            raise InputError(
                f"{file} has {size} bytes, the manifest says {recorded['bytes']}: it was truncated "
                "or changed. Copy the bundle again."
            )
        if sha256_file(file) != recorded["sha256"]:
            raise InputError(
                f"{file} was changed: its SHA-256 is not the manifest's. Copy the bundle again."
            )
    for name in (MODEL, GOLDEN):
        if name not in manifest["files"]:
            raise InputError(f"{bundle / MANIFEST} lists no {name}: copy the bundle again")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
