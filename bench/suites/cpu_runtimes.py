"""Time whole models in every runtime of a bundle on this machine's CPU, beside ONNX Runtime.

The models have a CLAdapter and random weights; every runtime takes the same uint8 images with all
cores, and computes normalisation, too. A file that does not agree with the unfolded fp32 model is
not timed: in fp32 it is wrong; INT8, which random weights may not survive, has FP8's bounds, and a
note says so.

Runtimes take turns: each round measures all of them, one after the other, and the ratio to ONNX
Runtime is that of one round. Medians count, so that a machine which is busy for a while does no
harm. Runtimes that are not installed are left out, and said.

The environment variable ``FASTADAPT_CPU_RUNTIMES`` chooses a part: a regular expression that is
searched in "ViT-tiny, OpenVINO INT8". ONNX Runtime in fp32 always runs beside it. Parts of one
commit that are run one after the other make a whole table.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

import fastadapt as fa
from fastadapt.errors import InputError
from fastadapt.export.backends import executorch, litert, openvino
from fastadapt.export.backends.aotinductor import build_aoti
from fastadapt.export.backends.onnx import export_onnx
from fastadapt.export.bundle.measured import machine
from fastadapt.export.precision.int8 import QuantizationImages, quantize_int8
from fastadapt.export.precision.quantizer import delicate_nodes, graph_layers
from fastadapt.export.runtimes import Runtime, load_runtime
from fastadapt.export.settings import Batches
from fastadapt.export.speed import format_rate, throughput

from ..choice import choose
from ..protocol import Benchmark, Row, Tables
from ..reporting.tables import one_line
from . import deployment
from .deployment import Subject, check, make_images, make_model, with_graph_input

TITLE = "Runtimes on a CPU: a backbone with a CLAdapter, 224 × 224"
NOTES = (
    "Images per second of uint8 images in memory, normalisation in the graph, all cores; medians "
    "of rounds in which all runtimes take turns. Ratios are to ONNX Runtime in fp32 in the same "
    "round."
)
SUBJECTS = (
    Subject("ViT-tiny", "vit_tiny_patch16_224", 2.5e9),
    Subject("EfficientNet-Lite0", "tf_efficientnet_lite0", 0.8e9),
)
BATCHES, ROUNDS, SECONDS, CALIBRATION = (1, 8, 32), 7, 1.0, 32
TARGET = 1.3  # of the best over ONNX Runtime in fp32, on two cores
RIVAL = "ONNX Runtime fp32"
CHOICE = "FASTADAPT_CPU_RUNTIMES"


@dataclass(frozen=True)
class Files:
    """What files of a subject are built of, and where.

    Attributes:
        folder: of the files.
        onnx: the fp32 ONNX file, which exists.
        model: the folded model with its normalisation.
        batch: sizes that the files take.
    """

    folder: Path
    onnx: Path
    model: nn.Module
    batch: Batches

    @property
    def example(self) -> tuple[torch.Tensor, ...]:
        """Return an input of the model."""
        return (make_images(1),)

    def calibration(self) -> QuantizationImages:
        """Return images for the ranges of INT8's activations."""
        pixels = make_images(CALIBRATION, seed=2).numpy()
        names = [Path(str(index)) for index in range(CALIBRATION)]

        def read(chosen: Sequence[Path]) -> np.ndarray:
            return pixels[[int(path.name) for path in chosen]]

        return QuantizationImages(names, (), None, read)


def _openvino(files: Files, path: Path) -> Any:
    return openvino.convert(files.onnx, path, files.batch)


def _openvino_int8(files: Files, path: Path, fp32_layers: int = 0) -> Any:
    images = files.calibration()
    batches = images.batches(images.calibration)
    layers = list(graph_layers(onnx.load(files.onnx).graph).values())[:fp32_layers]
    kept = [*delicate_nodes(files.onnx), *(node for nodes in layers for node in nodes)]
    return openvino.quantize(files.onnx, path, batches, files.batch, fp32_nodes=kept)


def _executorch_int8(files: Files, path: Path) -> Any:
    images = files.calibration()
    batches = images.batches(images.calibration)
    return executorch.quantize(files.model, files.example, path, batches, files.batch)


def _litert_int8(files: Files, path: Path) -> Any:
    images = files.calibration()
    batches = images.batches(images.calibration)
    fp32 = path.with_name("model.fp32.tflite")
    if not fp32.exists():  # else it was timed before
        litert.convert(files.model, files.example, fp32, files.batch)
    return litert.quantize(fp32, path, batches, files.batch)


@dataclass(frozen=True)
class Provider:
    """A file of a bundle, and what runs it.

    Attributes:
        file: its name.
        build: writes it.
        packages: modules that must be installed.
        precision: whose bounds it must keep.
    """

    file: str
    build: Callable[[Files, Path], Any] | None
    packages: tuple[str, ...] = ()
    precision: str = "fp32"


PROVIDERS = {
    RIVAL: Provider("model.onnx", None),
    "ONNX Runtime INT8": Provider(
        "model.int8.onnx",
        lambda files, path: quantize_int8(files.onnx, path, files.calibration()),
        precision="fp8",
    ),
    "OpenVINO fp32": Provider("model.fp32.xml", _openvino, ("openvino",)),
    "OpenVINO INT8": Provider("model.int8.xml", _openvino_int8, ("openvino", "nncf"), "fp8"),
    # As the gate keeps them of a trained EfficientNet-Lite0.
    "OpenVINO INT8, two layers in fp32": Provider(
        "model.int8.kept.xml",
        functools.partial(_openvino_int8, fp32_layers=2),
        ("openvino", "nncf"),
        "fp8",
    ),
    "ExecuTorch fp32": Provider(
        "model.fp32.pte",
        lambda files, path: executorch.convert(files.model, files.example, path, files.batch),
        ("executorch",),
    ),
    "LiteRT fp32": Provider(
        "model.fp32.tflite",
        lambda files, path: litert.convert(files.model, files.example, path, files.batch),
        ("litert_torch", "ai_edge_litert"),
    ),
    "ExecuTorch INT8": Provider("model.int8.pte", _executorch_int8, ("executorch",), "fp8"),
    "LiteRT INT8": Provider(
        "model.int8.tflite", _litert_int8, ("litert_torch", "ai_edge_quantizer"), "fp8"
    ),
    "AOTInductor fp32": Provider(
        "model.fp32.pt2",
        lambda files, path: build_aoti(files.model, files.example, path, files.batch),
    ),
}


@dataclass
class Results:
    """What is known of a subject: rates by runtime and batch, a value for each round."""

    subject: Subject
    rates: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    wrong: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def rows(self, batches: tuple[int, ...]) -> list[Row]:
        """Return a row for each runtime with rates and ratios, then the target."""
        rows: list[Row] = []
        best: dict[int, float] = {}
        for name, rates in self.rates.items():
            row: Row = {"runtime": name}
            for batch in batches:
                if not rates.get(batch):
                    continue
                rival = self.rates[RIVAL][batch]
                ratio = statistics.median(a / b for a, b in zip(rates[batch], rival, strict=False))
                best[batch] = max(best.get(batch, 0.0), ratio)
                row[f"{batch}"] = format_rate(statistics.median(rates[batch]))
                row[f"{batch}, ratio"] = f"{ratio:.2f}"
            rows.append(row)
        said = {
            f"{n}, ratio": f"{TARGET}: {'met' if v >= TARGET else 'missed'}"
            for n, v in best.items()
        }
        return [*rows, {"runtime": "target of the best", **said}] if best else rows


def run(quick: bool = False) -> Iterator[Tables]:
    """Build every file, then time all of them in turns; yield what there is after each round."""
    rounds, batches = (2, (1, 8)) if quick else (ROUNDS, BATCHES)
    found: list[Results] = []
    notes = [NOTES, f"{machine(on_gpu=False)}; {rounds} rounds."]
    todo = {s: chosen for s in SUBJECTS if (chosen := choose(CHOICE, s.title, PROVIDERS))}
    if not todo:
        raise InputError(f"{CHOICE} chooses nothing; {SUBJECTS[0].title}, {RIVAL} for one")
    if os.environ.get(CHOICE):
        notes.append(f"chosen: {CHOICE}={os.environ[CHOICE]!r}")
    with tempfile.TemporaryDirectory() as folder:
        for subject, chosen in todo.items():
            results = Results(subject)
            found.append(results)
            own = Path(folder) / subject.backbone
            own.mkdir()
            chosen = {RIVAL: PROVIDERS[RIVAL], **chosen}
            runtimes = _prepare(results, chosen, own, Batches(1, batches[-2], batches[-1]))
            for number in range(rounds):
                for name, runtime in runtimes.items():
                    for batch in batches:
                        images = make_images(batch).numpy()
                        rate = throughput(lambda r=runtime, x=images: r(x), batch, SECONDS)  # type: ignore[misc]
                        results.rates.setdefault(name, {}).setdefault(batch, []).append(rate)
                yield _tables(found, notes, batches, f"{subject.title}, round {number + 1}")


def _prepare(
    results: Results, providers: dict[str, Provider], folder: Path, batch: Batches
) -> dict[str, Runtime]:
    """Build, load and compare each file; return the runtimes of those that agree."""
    model = make_model(results.subject)
    images = make_images(deployment.SAMPLES)
    with torch.no_grad():
        expected = with_graph_input(model)(images).numpy()
    folded = fa.fold(model)
    path = folder / PROVIDERS[RIVAL].file
    size = (3, deployment.SIZE, deployment.SIZE)
    export_onnx(folded, path, input_size=size, graph_input=deployment.graph_input())
    files = Files(folder, path, with_graph_input(folded), batch)
    runtimes: dict[str, Runtime] = {}
    for name, provider in providers.items():
        missing = [p for p in provider.packages if importlib.util.find_spec(p) is None]
        if missing:
            results.notes.append(f"{name}: left out, {missing[0]} is not installed")
            continue
        try:
            if provider.build is not None:
                provider.build(files, folder / provider.file)
            runtime = load_runtime(folder / provider.file, device="cpu")
            parities = check(_on_cpu(runtime), images, expected, provider.precision, [batch.opt])
            runtime(make_images(batch.max).numpy())  # which it may refuse, though it was asked for
        except InputError as error:
            results.notes.append(f"{results.subject.title}, {name}: {one_line(error)}")
            continue
        ((parity, _),) = parities
        why = "; ".join(parity.problems)
        if parity.passed:
            runtimes[name] = runtime
        elif provider.precision != "fp32":  # of random weights, whose ranges are no model's
            results.notes.append(f"{results.subject.title}, {name}: not timed, {why}")
        else:
            results.wrong.append({"runtime": name, "why": why})
    return runtimes


def _on_cpu(runtime: Runtime) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: runtime(images.cpu())


def _tables(
    found: list[Results], notes: list[str], batches: tuple[int, ...], progress: str
) -> Tables:
    tables = {}
    for results in found:
        title = results.subject.title
        if results.wrong:
            tables[f"{title}, WRONG RESULTS, not timed"] = results.wrong
        tables[f"{title}: images per second by batch size"] = results.rows(batches)
    return Tables(
        tables,
        about=tuple(results.subject.title for results in found),
        wrong=[f"{r.subject.title}, {row['runtime']}" for r in found for row in r.wrong],
        notes=[*notes, *dict.fromkeys(line for r in found for line in r.notes)],
        progress=progress,
    )


BENCHMARK = Benchmark(TITLE, NOTES, run, slow=True)
