"""Train on 1, 2, 4, … GPUs of this machine: steps, whole epochs, and whether weights agree."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from fastadapt.files import write_json
from fastadapt.processes import without_place

from ..harness import four_digits
from ..protocol import Benchmark, Row, Tables
from ..scaling_worker import Found, Plan

TITLE = "Training on several GPUs of one machine"
NOTES = (
    "ViT-B/16 of random weights with a CLAdapter, bf16, generated JPEGs that are kept decoded; "
    "stage 1 without cached features, and stage 2. Steps: images/s of steady steps, from the "
    "decoded image on, captured in a CUDA graph with the sums of the gradients. Epochs: images/s "
    "of whole epochs of `torchrun … -m fastadapt train`, validation and states included, the "
    "median without each stage's first. Without exchange: the same step where each process trains "
    "for itself. Efficiency: images/s over those of one GPU times the number of GPUs."
)
WEAK, STRONG, SAME = "weak scaling", "strong scaling", "same weights"


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        backbone: timm's name.
        images: files that are generated.
        weak: images of a step for each process.
        strong: images of a step of all processes.
        steps, repeats: see :class:`fastadapt.bench.scaling_worker.Plan`.
        epochs: of each stage.
        options: more options of ``train``.
        image_size: of the model; the backbone's own if None.
    """

    backbone: str
    images: int
    weak: int
    strong: int
    steps: int
    repeats: int
    epochs: int
    options: tuple[str, ...] = ()
    image_size: int | None = None


GPU = Size("vit_base_patch16_224", 12_288, 64, 256, 30, 3, 4)
QUICK = Size("vit_base_patch16_224", 6_144, 64, 64, 25, 3, 3)  # weak scaling alone
CPU = Size(
    "test_vit",
    96,
    8,
    8,
    2,
    1,
    2,
    ("--image-size", "32", "--rank", "4", "--centers", "2", "--mlp-ratio", "1"),
    32,
)
# A run whose weights are compared, in full precision: differences are rounding, or mistakes.
CHECK: tuple[str, ...] = (
    "--backbone",
    "test_vit",
    "--stages",
    "2",
    "--epochs",
    "2",
    "--epochs2",
    "2",
)
CHECK += ("--amp", "off", "--rank", "8", "--centers", "4", "--batch-size", "24", "--no-probe")
CHECK += ("--no-pretrained", "--quiet", "--workers", "1", "--image-size", "64")
LARGEST_DIFFERENCE = 1e-4
LONGEST = 600  # seconds of one command


def run(quick: bool = False) -> Iterator[Tables]:
    """Measure on one GPU, then on two, four, … as many as there are."""
    gpus = torch.cuda.device_count()
    size = (QUICK if quick else GPU) if gpus else CPU
    counts = [count for count in (1, 2, 4, 8, 16) if count <= (gpus or 2)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_images(folder / "images", size.images)
        few = write_images(folder / "few", 160)
        found = Measured(size)
        for count in counts:
            if gpus or not quick:
                found.epochs[count] = _epochs(data, folder, size, count)
            found.steps += _steps(data, folder, size, count)
            found.differences |= _check(few, folder, count, again=not quick)
            yield found.tables(f"{count} of {counts[-1]} processes")


@dataclass
class Measured:
    """What was found so far.

    Attributes:
        size: what was measured.
        steps: of all counts of processes.
        epochs: count of processes to stage to images/s.
        differences: what was compared to the relative difference of the weights.
        rates: count of processes to the GB/s of sums, by size.
    """

    size: Size
    steps: list[Found] = field(default_factory=list)
    epochs: dict[int, dict[int, float]] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)

    def tables(self, progress: str) -> Tables:
        """Return all tables so far."""
        wrong = [name for name, value in self.differences.items() if value > LARGEST_DIFFERENCE]
        same = [
            {"compared": name, "relative difference of all weights": f"{value:.1e}"}
            for name, value in self.differences.items()
        ]
        weak = [s for s in self.steps if s.batch == self.size.weak * s.processes]
        strong = [s for s in self.steps if s.batch == self.size.strong]
        tables = {
            WEAK: [self._row(s, weak, True) for s in weak],
            SAME: same,
        }
        if self.size.strong > self.size.weak:
            tables[STRONG] = [self._row(s, strong, False) for s in strong]
        return Tables(tables, TITLE, [NOTES], wrong=wrong, progress=progress)

    def _row(self, step: Found, others: list[Found], with_epochs: bool) -> Row:
        one = next(s for s in others if s.stage == step.stage and s.processes == 1)
        times = step.images / one.images
        row: Row = {
            "stage": step.stage,
            "GPUs": step.processes,
            "images of a GPU's step": step.batch // step.processes,
            "step, ms": four_digits(step.milliseconds),
            "without exchange, ms": "" if step.alone is None else four_digits(step.alone),
            "gradients, MiB": round(step.gradients),
            "captured": "yes" if step.captured else "no",
            "steps, images/s": round(step.images),
            "times one GPU": f"{times:.2f}×",
            "efficiency": f"{times / step.processes:.0%}",
        }
        rates = self.epochs.get(step.processes, {})
        if with_epochs and step.stage in rates and 1 in self.epochs:
            rate, single = rates[step.stage], self.epochs[1][step.stage]
            row["epochs, images/s"] = round(rate)
            row["epochs, times one GPU"] = f"{rate / single:.2f}×"
        return row


def write_images(folder: Path, count: int) -> Path:
    """Write JPEGs of 256 × 256 of two classes, no two alike; return their folder."""
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)

    def write(index: int) -> None:
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 256, (24, 24, 3), np.uint8)
        pixels[:, :, 2] = pixels[:, :, 2] // 2 + 127 * (index % 2)  # something to learn
        path = folder / ("one", "two")[index % 2] / f"{index:06}.jpg"
        Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(path, quality=90)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(write, range(count)):
            pass
    return folder


def command(processes: int, module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in one process, or in several with torchrun."""
    if processes == 1:
        return [sys.executable, "-m", module, *arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *where]
    return [*torchrun, "--nproc-per-node", str(processes), "-m", module, *arguments]


def _start(words: list[str], **variables: str) -> subprocess.Popen:
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment = {**without_place(dict(os.environ)), **threads, **variables}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _finish(process: subprocess.Popen) -> None:
    try:
        said, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        raise RuntimeError(f"no end after {LONGEST} s: {process.args!r}") from None
    if process.returncode:
        ours = [line for line in said.splitlines() if line.startswith("fastadapt:")]
        last = ours or said.strip().splitlines()[-20:]
        raise RuntimeError(f"exit code {process.returncode}: {' | '.join(last)}")


def _steps(data: Path, folder: Path, size: Size, count: int) -> list[Found]:
    batches = {size.weak * count}
    if size.strong > size.weak:
        batches.add(size.strong)
    out, plan = folder / f"steps-{count}.json", folder / f"plan-{count}.json"
    described = Plan(
        str(data),
        size.backbone,
        str(out),
        tuple(sorted(batches)),
        size.steps,
        size.repeats,
        size.image_size,
    )
    write_json(plan, asdict(described))
    _finish(_start(command(count, "fastadapt.bench.scaling_worker", str(plan))))
    return [Found(**item) for item in json.loads(out.read_text())["steps"]]


def _epochs(data: Path, folder: Path, size: Size, count: int) -> dict[int, float]:
    """Return images/s of whole epochs by stage."""
    out = folder / f"run-{count}"
    options = ["--backbone", size.backbone, "--no-pretrained", "--no-cache", "--stages", "2"]
    options += ["--epochs", str(size.epochs), "--epochs2", str(size.epochs), "--no-probe"]
    options += ["--batch-size", str(size.weak * count), "--lr", "1e-4", "--val-fraction", "0.05"]
    options += ["--quiet", *size.options]
    _finish(_start(command(count, "fastadapt", "train", str(data), "--out", str(out), *options)))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    with (out / "splits.csv").open() as file:
        images = sum(",train" in line for line in file)
    return {
        stage: images
        / median(row["seconds"] for row in rows if row["stage"] == stage and row["epoch"] > 1)
        for stage in (1, 2)
    }


def _check(data: Path, folder: Path, count: int, again: bool) -> dict[str, float]:
    """Train the same small run in several processes; compare its weights with those of one.

    Args:
        data, folder, count: as elsewhere.
        again: train twice in one process, too.
    """

    def start(name: str, processes: int, **variables: str) -> subprocess.Popen:
        arguments = ["train", str(data), "--out", str(folder / name), *CHECK]
        return _start(command(processes, "fastadapt", *arguments), **variables)

    if count == 1:  # twice: what differs between equal runs is no mistake of ours
        last = str(max(torch.cuda.device_count() - 1, 0))
        both = [start("one", 1)]
        if again:
            both.append(start("again", 1, CUDA_VISIBLE_DEVICES=last))
        for process in both:
            _finish(process)
        if not again:
            return {}
        return {"1 process and 1 process": _difference(folder / "one", folder / "again")}
    _finish(start(f"check-{count}", count))
    name = f"{count} processes and 1 process"
    return {name: _difference(folder / "one", folder / f"check-{count}")}


def _difference(one: Path, other: Path) -> float:
    """Return the relative difference of all weights of two runs."""
    a, b = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    x, y = (torch.cat([t.double().flatten() for t in tensors.values()]) for tensors in (a, b))
    return float((x - y).norm() / x.norm())


BENCHMARK = Benchmark(TITLE, NOTES, run, slow=True)
