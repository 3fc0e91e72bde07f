"""Time whole models in every runtime: images per second, latency, agreement of the outputs.

The models are ViT-B/16 and ConvNeXt-B with a CLAdapter, with random weights. Every runtime computes
the same from the same uint8 images on the GPU, normalisation included; inputs and outputs stay
there (no copies over PCIe). A runtime that does not agree with the unfolded fp32 model is not
timed. FP8 has bounds and a target of its own; the other targets must be met without it.

The environment variable ``FASTADAPT_DEPLOYMENT`` chooses a part: a regular expression that is
searched for in names such as "ViT-B/16, AOTInductor bf16", ignoring case. "convnext" is one
backbone in every runtime, "vit.*aotinductor" one kind of runtime.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.export.backends.aotinductor import build_aoti
from fastadapt.export.backends.fastadapt import build_fused, calibrate_float8
from fastadapt.export.backends.fused_attention import fuse_attention
from fastadapt.export.backends.onnx import export_onnx
from fastadapt.export.graph_input import Deployed, GraphInput
from fastadapt.export.parity import THRESHOLDS, Parity, Thresholds, compare
from fastadapt.export.precision.fp8 import check_gpu, quantize_fp8
from fastadapt.export.precision.half import MixedPrecision, precision_units
from fastadapt.export.runtimes import load_runtime
from fastadapt.export.settings import Batches

from .. import harness, upstream
from .. import network_step as steps
from ..choice import choose
from ..deployed_calls import SIZE, Call, images_per_second, latency, make_images
from ..protocol import Benchmark, Row, Tables
from ..reporting.tables import one_line

TITLE = "Deployment: a backbone with a CLAdapter, 224 × 224"
NOTES = "Inputs and outputs stay on the GPU; uint8 images, normalisation in the graph."
CLASSES = 10
BATCHES, ODD = (1, 8, 64, 256), 5
SPEED = "images per second by batch size, and latency of single images"
AGREEMENT = "agreement with the unfolded fp32 model"
BEST = "best of a bundle in 16 bit, of the floor"
TARGET, FP8_TARGET = "target in 16 bit, on an H100", "target in FP8, on an H100"
SAMPLES, PREPARE_SECONDS = 16, 400
ONNX, ONNX_FUSED = "model.fp16.onnx", "model.fp16.fused.onnx"
AOTI, FP8 = "model.bf16.pt2", "model.fp8.pt2"
FUSED, FUSED_FP8 = "model.bf16.safetensors", "model.fp8.safetensors"
# A bundle's FP8 is judged by its accuracy, of which random weights have none. Computed on a CPU,
# ViT-B/16 in FP8 is off by 0.25 of the spread at worst, with cosine 0.996. Images whose two highest
# outputs differ by more than twice the error that is allowed must keep their class.
BOUNDS = {**THRESHOLDS, "fp8": Thresholds(error=0.4, cosine=0.99)}
CHOICE = "FASTADAPT_DEPLOYMENT"


@dataclass(frozen=True)
class Subject:
    """A backbone that is timed with an adapter after it.

    Attributes:
        title: its name in tables.
        backbone: timm's name.
        flops: FLOPs of one image, the adapter's included, as PyTorch's FlopCounterMode counts.
        targets: batch size to images per second on an H100, first target and ambition, for the
            best runtime of a bundle in 16 bit.
        fp8_targets: batch size to images per second in FP8.
        attention: whether ONNX Runtime has attention to fuse.
    """

    title: str
    backbone: str
    flops: float
    targets: dict[int, tuple[int, int]] = field(default_factory=dict, hash=False)
    fp8_targets: dict[int, tuple[int]] = field(default_factory=dict, hash=False)
    attention: bool = True


SUBJECTS = (
    Subject(
        "ViT-B/16",
        "vit_base_patch16_224",
        37.2e9,
        {8: (7_100, 8_000), 64: (10_000, 11_500), 256: (10_500, 12_000)},
        {256: (14_000,)},
    ),
    Subject("ConvNeXt-B", "convnext_base", 31.6e9, attention=False),
)


def make_model(subject: Subject) -> fa.AdaptedModel:
    """Make a model with the same random weights in every process."""
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model(subject.backbone, num_classes=0)
    return fa.adapt(
        backbone, fa.AdaptConfig(input_size=(3, SIZE, SIZE)), num_classes=CLASSES
    ).eval()


def graph_input() -> GraphInput:
    """Return the input of all models: uint8 images of one size, normalised in the graph."""
    return GraphInput(Preprocess((3, SIZE, SIZE)))


def with_graph_input(model: nn.Module) -> Deployed:
    """Put the normalisation of uint8 images before a model."""
    return Deployed(model, graph_input())


def _on_device(model: nn.Module) -> nn.Module:
    return with_graph_input(model).to(harness.device())


def prepare(subject: Subject, part: str, folder: str) -> float:
    """Compile one part, in a process of its own: files into ``folder``, code into the caches.

    Args:
        subject: the model to compile.
        part: ``"onnx"``, ``"aoti"``, ``"fp8"``, ``"fused"``, ``"fused fp8"``, or a batch size
            for torch.compile.
        folder: the subject's folder.

    Returns:
        The seconds that it took.
    """
    start = time.perf_counter()
    folded = fa.fold(make_model(subject))
    if part == "onnx":
        half = _as_shipped(folded, torch.float16)
        path = Path(folder) / ONNX
        export_onnx(half, path, input_size=(3, SIZE, SIZE), graph_input=graph_input())
        fuse_attention(path, path.with_name(ONNX_FUSED), gpu=True)
    elif part == "fused":
        build_fused(with_graph_input(folded), Path(folder) / FUSED)
    elif part == "fused fp8":
        check_gpu()
        deployed, images = with_graph_input(folded), make_images(SAMPLES, seed=2)
        float8 = calibrate_float8(deployed, [images], harness.device().type)
        build_fused(deployed, Path(folder) / FUSED_FP8, precision="fp8", float8=float8)
    elif part in ("aoti", "fp8"):
        shipped = _as_shipped(folded, torch.bfloat16)
        model: nn.Module = shipped
        name = AOTI
        if part == "fp8":
            check_gpu()
            images = make_images(SAMPLES, seed=2).to(harness.device())
            model, name = quantize_fp8(shipped, [images], _on_device)[0], FP8
        batch = Batches(min(BATCHES), min(64, max(BATCHES)), max(BATCHES))
        example = (make_images(2).to(harness.device()),)
        path = Path(folder) / name
        build_aoti(_on_device(model), example, path, batch, precision=name.split(".")[1])
    else:
        call = _compiled(_bf16(folded))
        call(make_images(int(part)).to(harness.device()))
    return time.perf_counter() - start


def _as_shipped(folded: nn.Module, dtype: torch.dtype) -> MixedPrecision:
    units = precision_units(folded, torch.rand(1, 3, SIZE, SIZE))
    return MixedPrecision(folded, dtype, units).eval()


def _bf16(folded: nn.Module) -> nn.Module:
    """Cast once, as users would write it: no casts in each layer, which cost eager calls time."""
    return _on_device(MixedPrecision(folded, torch.bfloat16, ()))


def _compiled(model: nn.Module) -> Call:
    return torch.no_grad()(torch.compile(model, dynamic=False))


def _upstream(model: nn.Module) -> Call:
    """Return the unfolded fp32 model as upstream runs it: eager, under autocast."""
    model = copy.deepcopy(model)
    adapter: Any = model.adapter
    for block in adapter.blocks:
        block.attn = upstream.ClusterAttention(block.attn)
    model = _on_device(model)

    @torch.no_grad()
    def call(images: Tensor) -> Tensor:
        with torch.autocast(harness.device().type, torch.bfloat16):
            return model(images).float()

    return call


@dataclass(frozen=True)
class Provider:
    """One way to run a model.

    Attributes:
        precision: the precision whose thresholds it must keep.
        part: what :func:`prepare` must have made for it; ``"compile"`` is every batch size.
        make: returns the call, when its turn comes.
    """

    precision: str
    part: str | None
    make: Callable[[], Call]


def providers(subject: Subject, folder: Path) -> dict[str, Provider]:
    """Return every way to run a subject, by name."""
    model = functools.cache(lambda: make_model(subject))
    folded = functools.cache(lambda: fa.fold(model()))

    def runtime(file: str, cuda_graph: bool = False) -> Callable[[], Call]:
        return lambda: load_runtime(folder / file, device="cuda", cuda_graph=cuda_graph)

    found = {
        "upstream, AMP bf16, eager": Provider("bf16", None, lambda: _upstream(model())),
        "bf16, eager": Provider("bf16", None, lambda: torch.no_grad()(_bf16(folded()))),
        "bf16, torch.compile, CUDA graph": Provider(
            "bf16",
            "compile",
            lambda: fa.GraphedCall(_compiled(_bf16(folded())), say=steps.say),
        ),
        "AOTInductor bf16": Provider("bf16", "aoti", runtime(AOTI)),
        "AOTInductor bf16, CUDA graph": Provider("bf16", "aoti", runtime(AOTI, cuda_graph=True)),
        "fastadapt bf16, CUDA graph": Provider("bf16", "fused", runtime(FUSED)),
        "fastadapt fp8, CUDA graph": Provider("fp8", "fused fp8", runtime(FUSED_FP8)),
        "AOTInductor fp8": Provider("fp8", "fp8", runtime(FP8)),
        "AOTInductor fp8, CUDA graph": Provider("fp8", "fp8", runtime(FP8, cuda_graph=True)),
        "ONNX Runtime fp16, I/O binding": Provider("fp16", "onnx", runtime(ONNX)),
        "ONNX Runtime fp16, CUDA graph": Provider("fp16", "onnx", runtime(ONNX, cuda_graph=True)),
    }
    if subject.attention:
        fused = {
            "ONNX Runtime fp16, fused attention, I/O binding": runtime(ONNX_FUSED),
            "ONNX Runtime fp16, fused attention, CUDA graph": runtime(ONNX_FUSED, cuda_graph=True),
        }
        found |= {name: Provider("fp16", "onnx", make) for name, make in fused.items()}
    return found


# What a bundle holds, for any batch size; the others are what it is compared with.
OURS = ("AOTInductor", "fastadapt", "ONNX Runtime")


@dataclass
class Results:
    """What was measured of a subject so far."""

    subject: Subject
    batches: tuple[int, ...]
    speeds: dict[str, dict[int, float]] = field(default_factory=dict)
    times: dict[str, dict[str, str]] = field(default_factory=dict)  # of single images
    parities: list[Row] = field(default_factory=list)
    wrong: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def tables(self) -> dict[str, list[Row]]:
        """Return tables by title, which names the backbone."""
        tables = {
            "WRONG RESULTS, not timed": self.wrong,
            SPEED: self._speed_rows(),
            AGREEMENT: self.parities,
        }
        return {f"{self.subject.title}, {title}": rows for title, rows in tables.items() if rows}

    def _speed_rows(self) -> list[Row]:
        """Return a row for each runtime, then shares and targets of a bundle's best."""
        if not self.speeds:
            return []
        rows: list[Row] = [
            {"runtime": name, **{str(n): f"{v:,.0f}" for n, v in found.items()}, **self.times[name]}
            for name, found in self.speeds.items()
        ]
        floor = harness.floor(self.subject.flops, 0) / 1e6
        shares = {str(n): f"{100 * floor * self._best(n):.0f} %" for n in self.batches}
        rows.append({"runtime": BEST, **shares})
        for title, fp8, targets in (
            (TARGET, False, self.subject.targets),
            (FP8_TARGET, True, self.subject.fp8_targets),
        ):
            kept = [n for n in self.batches if n in targets]
            if kept:
                cells = {str(n): _met(self._best(n, fp8=fp8), targets[n]) for n in kept}
                rows.append({"runtime": title, **cells})
        return rows

    def _best(self, batch: int, *, fp8: bool = False) -> float:
        """Return the images per second of the fastest runtime that a bundle holds."""
        names = (n for n in self.speeds if n.startswith(OURS) and ("fp8" in n) == fp8)
        return max((self.speeds[name][batch] for name in names), default=0.0)


def _met(speed: float, targets: tuple[int, ...]) -> str:
    met = sum(speed >= target for target in targets)
    word = "missed" if met == 0 else "met" if met == len(targets) else "first met"
    return f"{' / '.join(f'{target:,}' for target in targets)}: {word}"


def run(quick: bool = False) -> Iterator[Tables]:
    """Time every runtime; yield what there is after each."""
    batches = (1, 64) if quick else BATCHES
    images = make_images(SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        every = {s: providers(s, Path(folder) / s.backbone) for s in SUBJECTS}
        todo = {s: some for s, all_ in every.items() if (some := choose(CHOICE, s.title, all_))}
        if not todo:
            raise InputError(f"{CHOICE} chooses nothing; {SUBJECTS[0].title}, AOTInductor for one")
        notes = [NOTES, *_prepare_all(_parts(todo, batches), folder)]
        if os.environ.get(CHOICE):
            notes.append(f"chosen: {CHOICE}={os.environ[CHOICE]!r}")
        left = [f"{subject.title}, {name}" for subject, chosen in todo.items() for name in chosen]
        found = [Results(subject, batches) for subject in todo]
        yield _to_tables(found, notes, left, "; ".join(notes[1:]))
        for results, chosen in zip(found, todo.values(), strict=True):
            with torch.no_grad():
                expected = with_graph_input(make_model(results.subject))(images).numpy()
            for name, provider in chosen.items():
                said = f"{left.pop(0)}: {_measure(name, provider, images, expected, results)}"
                yield _to_tables(found, notes, left, said)


def _parts(
    todo: dict[Subject, dict[str, Provider]], batches: tuple[int, ...]
) -> list[tuple[Subject, str]]:
    """Return what must be compiled; what takes longest comes first."""
    needed = [(s, part) for s, some in todo.items() for part in {p.part for p in some.values()}]
    parts = ("fp8", "aoti", "onnx", "fused fp8", "fused")
    whole = [(s, part) for part in parts for s, p in needed if p == part]
    return whole + [(s, str(batch)) for s, part in needed if part == "compile" for batch in batches]


def _to_tables(
    found: Sequence[Results], notes: list[str], left: list[str], progress: str
) -> Tables:
    tables = {title: rows for results in found for title, rows in results.tables().items()}
    return Tables(
        tables,
        about=tuple(results.subject.title for results in found),
        summary=[title for title in tables if title.endswith(SPEED)],
        wrong=[
            f"{results.subject.title}, {row['runtime']}, batch {row['batch']}"
            for results in found
            for row in results.wrong
        ],
        notes=[*notes, *(line for results in found for line in results.failed)],
        left_out=[f"{name}: the run ended before it" for name in left],
        progress=progress,
    )


def _measure(
    name: str, provider: Provider, images: Tensor, expected: np.ndarray, results: Results
) -> str:
    """Measure one runtime into ``results``; return that in short."""
    torch.compiler.reset()
    sizes = {*results.batches, ODD} if name.startswith(OURS) else {*results.batches}
    call: Call | None = None
    try:
        call = provider.make()
        found = check(call, images, expected, provider.precision, sorted(sizes))
        results.parities += [_parity_row(name, *row) for row in found]
        if not all(parity.passed for parity, _ in found):
            results.wrong += [_parity_row(name, *row) for row in found if not row[0].passed]
            return "WRONG"
        speeds = {batch: images_per_second(call, batch) for batch in results.batches}
        results.times[name] = latency(call)
        results.speeds[name] = speeds
        return ", ".join(f"{speed:,.0f} at {batch}" for batch, speed in speeds.items())
    except Exception as error:  # one runtime that fails leaves the others' figures
        reason = f"not measured, {one_line(error)}"
        results.failed.append(f"{results.subject.title}, {name}: {reason}")
        return reason
    finally:
        del call  # before its memory is given back
        harness.release()


def _prepare_all(parts: Sequence[tuple[Subject, str]], folder: str) -> list[str]:
    """Compile everything side by side; what takes too long is given up."""
    if not parts:
        return []
    context = get_context("spawn")
    notes = []
    with ProcessPoolExecutor(len(parts), context, _share_cores, (len(parts),)) as pool:
        started = {}
        for subject, part in parts:
            own = Path(folder) / subject.backbone
            own.mkdir(exist_ok=True)
            started[f"{subject.title}, {part}"] = pool.submit(prepare, subject, part, str(own))
        wait(started.values(), timeout=PREPARE_SECONDS)
        for part, future in started.items():
            if not future.done():
                notes.append(f"{part}: not ready after {PREPARE_SECONDS} s")
            elif (error := future.exception()) is not None:
                notes.append(f"{part}: failed, {one_line(error)}")
            else:
                notes.append(f"{part}: prepared in {future.result():.0f} s")
        if not all(future.done() for future in started.values()):
            for process in list(pool._processes.values()):
                process.terminate()
    return notes


def _share_cores(parts: int) -> None:
    """Limit the compiler's own processes to twice as many in all as there are cores.

    Those of a part wait while it traces.
    """
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // parts))
    torch._inductor.config.compile_threads = max(1, 2 * cores // parts)


def check(
    call: Call, images: Tensor, expected: np.ndarray, precision: str, batches: Sequence[int]
) -> list[tuple[Parity, float]]:
    """Compare outputs at every batch size; return parities and shares of the same class."""
    found = []
    for batch in batches:
        rows = torch.arange(math.ceil(len(images) / batch) * batch) % len(images)
        parts = [
            call(images[part].to(harness.device())).float().cpu() for part in rows.split(batch)
        ]
        want, got = expected[rows.numpy()], torch.cat(parts).numpy()
        parity = compare(want, got, batch=batch, thresholds=BOUNDS[precision])
        found.append((parity, float((want.argmax(axis=1) == got.argmax(axis=1)).mean())))
    return found


def _parity_row(name: str, parity: Parity, same: float) -> Row:
    error = None if parity.error is None else f"{parity.error:.1e}"
    cosine = None if parity.cosine is None else f"{parity.cosine:.6f}"
    spread = None if parity.spread is None else f"{parity.spread:.1e}"
    return {
        "runtime": name,
        "batch": parity.batch,
        "error, of the spread": error,
        "at most": f"{parity.limit:g}",
        "cosine": cosine,
        "same class": f"{same:.0%}",
        "spread": spread,
        "passed": "; ".join(parity.problems) or "yes",
    }


BENCHMARK = Benchmark(TITLE, NOTES, run, needs_gpu=True, slow=True)
