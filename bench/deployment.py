"""A whole model in every runtime: images per second, latency, and whether the outputs agree.

ViT-B/16 with a CLAdapter, random weights. Everything computes the same from the same uint8 images
on the GPU, normalisation included; inputs and outputs stay there (no copies over PCIe). A runtime
that does not agree with the unfolded fp32 model is not timed.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fastadapt as fa
from fastadapt.bench import harness, report, steps
from fastadapt.bench.cluster_attention import upstream_formulation
from fastadapt.export.aotinductor import build_aoti
from fastadapt.export.artefact import THRESHOLDS, Batches
from fastadapt.export.graph_input import Deployed, GraphInput
from fastadapt.export.onnx import export_onnx
from fastadapt.export.parity import Parity, compare
from fastadapt.export.precision import MixedPrecision, precision_units
from fastadapt.export.runtimes import load_runtime
from fastadapt.layers import ClusterAttention
from fastadapt.preprocess import Preprocess

TITLE = "Deployment: ViT-B/16 with a CLAdapter, 224 × 224"
NOTES = "Inputs and outputs stay on the GPU; uint8 images, normalisation in the graph."
BACKBONE, SIZE, CLASSES = "vit_base_patch16_224", 224, 10
BATCHES, ODD = (1, 8, 64, 256), 5
# Images per second on an H100, first target and ambition, of the best runtime of a bundle.
TARGETS = {8: (7_100, 8_000), 64: (10_000, 11_500), 256: (10_500, 12_000)}
FLOPS_PER_IMAGE = 35.2e9
SPEED, LATENCY = "images per second", "latency at batch 1, ms"
SAMPLES, LATENCY_CALLS, PREPARE_SECONDS = 16, 300, 400
ONNX, AOTI = "model.fp16.onnx", "model.bf16.pt2"

Call = Callable[[Tensor], Tensor]


def make_model() -> fa.AdaptedModel:
    """The same random weights in every process."""
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model(BACKBONE, num_classes=0)
    return fa.adapt(
        backbone, fa.AdaptConfig(input_size=(3, SIZE, SIZE)), num_classes=CLASSES
    ).eval()


def make_images(count: int) -> Tensor:
    """uint8 [count, SIZE, SIZE, 3]: smooth, of different colours and contrasts."""
    generator = torch.Generator().manual_seed(1)
    small = torch.rand(count, 3, 7, 7, generator=generator)
    small = small * torch.rand(count, 1, 1, 1, generator=generator)
    images = nn.functional.interpolate(small, (SIZE, SIZE), mode="bilinear")
    return (images * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _graph_input() -> GraphInput:
    return GraphInput(Preprocess((3, SIZE, SIZE)))


def _behind_input(model: nn.Module) -> nn.Module:
    return Deployed(model, _graph_input())


def prepare(part: str, folder: str) -> float:
    """Compiles one part, in a process of its own: files into ``folder``, code into the caches.

    Args:
        part: ``"onnx"``, ``"aoti"``, or a batch size: for torch.compile.

    Returns:
        How many seconds it took.
    """
    start = time.perf_counter()
    folded = fa.fold(make_model())
    if part == "onnx":
        half = _as_shipped(folded, torch.float16)
        path = Path(folder) / ONNX
        export_onnx(half, path, input_size=(3, SIZE, SIZE), graph_input=_graph_input())
    elif part == "aoti":
        model = _behind_input(_as_shipped(folded, torch.bfloat16)).to(harness.device())
        batch = Batches(min(BATCHES), 64, max(BATCHES))
        example = (make_images(2).to(harness.device()),)
        build_aoti(model, example, Path(folder) / AOTI, batch, precision="bf16")
    else:
        model = _compiled(_bf16(folded))
        model(make_images(int(part)).to(harness.device()))
    return time.perf_counter() - start


def _as_shipped(folded: nn.Module, dtype: torch.dtype) -> MixedPrecision:
    units = precision_units(folded, torch.rand(1, 3, SIZE, SIZE))
    return MixedPrecision(folded, dtype, units).eval()


def _bf16(folded: nn.Module) -> nn.Module:
    """What one would write: no layer casts, which costs an eager call time."""
    return _behind_input(MixedPrecision(folded, torch.bfloat16, ())).to(harness.device())


def _compiled(model: nn.Module) -> Call:
    return torch.no_grad()(torch.compile(model, dynamic=False))


class _UpstreamAttention(nn.Module):
    """Cluster attention in upstream's steps."""

    def __init__(self, layer: ClusterAttention):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        own = self.layer
        return upstream_formulation(
            x,
            own.centers,
            own.transforms,
            own.down.weight,
            own.down.bias,
            own.up.weight,
            own.up.bias,
        )


def _upstream(model: nn.Module) -> Call:
    """The unfolded fp32 model as upstream runs it: eager, under autocast."""
    model = copy.deepcopy(model)
    for block in model.adapter.blocks:
        block.attn = _UpstreamAttention(block.attn)
    model = _behind_input(model).to(harness.device())

    @torch.no_grad()
    def call(images: Tensor) -> Tensor:
        with torch.autocast(harness.device().type, torch.bfloat16):
            return model(images).float()

    return call


def providers(folder: Path) -> dict[str, tuple[str, Callable[[], Call]]]:
    """Name to precision and what makes the call, made only when its turn comes."""
    model = make_model()
    folded = fa.fold(model)

    def runtime(file: str, cuda_graph: bool = False) -> Callable[[], Call]:
        return lambda: load_runtime(folder / file, device="cuda", cuda_graph=cuda_graph)

    return {
        "upstream, AMP bf16, eager": ("bf16", lambda: _upstream(model)),
        "bf16, eager": ("bf16", lambda: torch.no_grad()(_bf16(folded))),
        "bf16, torch.compile, CUDA graph": (
            "bf16",
            lambda: fa.GraphedCall(_compiled(_bf16(folded)), say=steps.say),
        ),
        "AOTInductor bf16": ("bf16", runtime(AOTI)),
        "AOTInductor bf16, CUDA graph": ("bf16", runtime(AOTI, cuda_graph=True)),
        "ONNX Runtime fp16, I/O binding": ("fp16", runtime(ONNX)),
        "ONNX Runtime fp16, CUDA graph": ("fp16", runtime(ONNX, cuda_graph=True)),
    }


# What a bundle holds, for any batch size; the others are what it is compared with.
OURS = ("AOTInductor", "ONNX Runtime")


@dataclass
class Results:
    """What was measured so far."""

    batches: tuple[int, ...]
    notes: list[str]
    speeds: dict[str, dict[int, float]] = field(default_factory=dict)
    latencies: list[dict] = field(default_factory=list)
    parities: list[dict] = field(default_factory=list)
    wrong: list[dict] = field(default_factory=list)

    def to_dict(self, progress: str, left: Sequence[str] = ()) -> dict:
        """See :mod:`fastadapt.bench`; ``left`` are the runtimes that are still to come."""
        tables = {
            "WRONG RESULTS, not timed": self.wrong,
            SPEED: [_speed_row(batch, self.speeds) for batch in self.batches if self.speeds],
            LATENCY: self.latencies,
            "agreement with the unfolded fp32 model": self.parities,
        }
        tables = {title: rows for title, rows in tables.items() if rows}
        return {
            "title": TITLE,
            "tables": tables,
            "readme": [title for title in (SPEED, LATENCY) if title in tables],
            "wrong": [f"{row['runtime']}, batch {row['batch']}" for row in self.wrong],
            "notes": self.notes,
            "left_out": [f"{name}: the run ended before it" for name in left],
            "progress": progress,
        }


def run(quick: bool = False) -> Iterator[dict]:
    """Times every runtime; yields what there is after each, see :mod:`fastadapt.bench`."""
    batches = (1, 64) if quick else BATCHES
    images = make_images(SAMPLES)
    with torch.no_grad():
        expected = _behind_input(make_model())(images).numpy()
    results = Results(batches, [NOTES])
    with tempfile.TemporaryDirectory() as folder:
        results.notes += _prepare_all(batches, folder)
        runtimes = providers(Path(folder))
        left = list(runtimes)
        yield results.to_dict("; ".join(results.notes[1:]), left)
        for name, (precision, make) in runtimes.items():
            left.remove(name)
            said = _measure(name, precision, make, images, expected, results)
            yield results.to_dict(f"{name}: {said}", left)


def _measure(
    name: str,
    precision: str,
    make: Callable[[], Call],
    images: Tensor,
    expected: np.ndarray,
    results: Results,
) -> str:
    """One runtime into ``results``; returns that in short."""
    torch.compiler.reset()
    sizes = {*results.batches, ODD} if name.startswith(OURS) else {*results.batches}
    try:
        call = make()
        parity = check(call, images, expected, precision, sorted(sizes))
        results.parities += [_parity_row(name, p) for p in parity]
        if not all(p.passed for p in parity):
            results.wrong += [_parity_row(name, p) for p in parity if not p.passed]
            return "WRONG"
        found = {batch: images_per_second(call, batch) for batch in results.batches}
        results.speeds[name] = found
        results.latencies.append({"runtime": name, **latency(call)})
        return ", ".join(f"{speed:,.0f} at {batch}" for batch, speed in found.items())
    except Exception as error:  # one runtime that fails leaves the others' figures
        results.notes.append(f"{name}: not measured, {report.one_line(error)}")
        return results.notes[-1]
    finally:
        call = make = None
        harness.release()


def _prepare_all(batches: tuple[int, ...], folder: str) -> list[str]:
    """Everything that compiles, side by side; what takes too long is given up."""
    parts = ["aoti", "onnx", *map(str, batches)]
    context = get_context("spawn")
    notes = []
    with ProcessPoolExecutor(len(parts), context, _share_cores, (len(parts),)) as pool:
        started = {part: pool.submit(prepare, part, folder) for part in parts}
        wait(started.values(), timeout=PREPARE_SECONDS)
        for part, future in started.items():
            if not future.done():
                notes.append(f"{part} was not ready after {PREPARE_SECONDS} s")
            elif (error := future.exception()) is not None:
                notes.append(f"{part} failed: {report.one_line(error)}")
            else:
                notes.append(f"prepared {part} in {future.result():.0f} s")
        if not all(future.done() for future in started.values()):
            for process in list(pool._processes.values()):
                process.terminate()
    return notes


def _share_cores(parts: int) -> None:
    """The compiler's own processes: as many in all as there are cores."""
    cores = max(1, (os.cpu_count() or 1) // parts)
    torch.set_num_threads(cores)
    torch._inductor.config.compile_threads = cores


def check(
    call: Call, images: Tensor, expected: np.ndarray, precision: str, batches: Sequence[int]
) -> list[Parity]:
    """The gate, at every batch size that is given."""
    parities = []
    for batch in batches:
        rows = torch.arange(math.ceil(len(images) / batch) * batch) % len(images)
        parts = [
            call(images[part].to(harness.device())).float().cpu() for part in rows.split(batch)
        ]
        parities.append(
            compare(
                expected[rows.numpy()],
                torch.cat(parts).numpy(),
                batch=batch,
                thresholds=THRESHOLDS[precision],
            )
        )
    return parities


def images_per_second(call: Call, batch: int, seconds: float = 1.0) -> float:
    """Calls after one another, waited for at the end; the median of several rounds."""
    x = make_images(batch).to(harness.device())
    calls = 1
    while _seconds(call, x, calls) < seconds / 6:
        calls *= 2
    return batch * calls / statistics.median(_seconds(call, x, calls) for _ in range(5))


def _seconds(call: Call, x: Tensor, calls: int) -> float:
    harness.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call(x)
    harness.synchronize()
    return time.perf_counter() - start


def latency(call: Call) -> dict[str, str]:
    """p50 and p99 of single calls at batch 1, from the call to the result on the GPU."""
    x = make_images(1).to(harness.device())
    for _ in range(20):
        call(x)
    times = [_seconds(call, x, 1) * 1e3 for _ in range(LATENCY_CALLS)]
    return {"p50": f"{np.percentile(times, 50):.3f}", "p99": f"{np.percentile(times, 99):.3f}"}


def _parity_row(name: str, parity: Parity) -> dict:
    error = None if parity.error is None else f"{parity.error:.1e}"
    cosine = None if parity.cosine is None else f"{parity.cosine:.6f}"
    spread = None if parity.spread is None else f"{parity.spread:.1e}"
    return {
        "runtime": name,
        "batch": parity.batch,
        "error, of the spread": error,
        "cosine": cosine,
        "spread": spread,
        "passed": "; ".join(parity.problems) or "yes",
    }


def _speed_row(batch: int, speeds: dict[str, dict[int, float]]) -> dict:
    row: dict = {"batch": batch}
    row |= {name: f"{found[batch]:,.0f}" for name, found in speeds.items()}
    ours = [found[batch] for name, found in speeds.items() if name.startswith(OURS)]
    best = max(ours, default=0.0)
    floor = harness.floor(FLOPS_PER_IMAGE, 0) / 1e6
    row["best of a bundle, of the floor"] = f"{100 * best * floor:.0f} %"
    if batch not in TARGETS:
        return row | {"target": None, "met": None}
    first, ambition = TARGETS[batch]
    met = "both" if best >= ambition else "first" if best >= first else "no"
    return row | {"target": f"{first:,} / {ambition:,}", "met": met}
