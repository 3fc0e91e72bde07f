"""Time whole commands from image files to a trained model, beside plain PyTorch and timm.

Each command runs in a process of its own, and its wall time is cut into phases: start (process,
imports, model, first use of the GPU), decode (waiting for images), features, stage 1, stage 2,
validation, saving, and other (the end of the process, and what a command does not tell).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import harness, job_files
from ..plain import image_classifier
from ..protocol import Benchmark, Row, Tables, Timeline

TITLE = "Whole jobs, from image files to a trained model"
NOTES = (
    "Wall times in seconds of whole commands, each in a process of its own, one after the other in "
    "one run on one machine. Ours is `fastadapt train` and `fastadapt gdpl`. Plain is a page of "
    "ordinary user code (`bench/plain/image_classifier.py`): timm, a DataLoader whose worker "
    "processes decode, a frozen backbone under no_grad in stage 1, the paper's adapter, fused "
    "AdamW; “cached by hand” computes the features of stage 1 once and keeps them on the device. "
    "Upstream's loop (`bench/plain/gdpl_loop.py`) is the paper's GDPL step on the same data. Cold "
    "is the first run, with empty caches of compiled kernels and of Python's bytecode; warm is the "
    "second. All others are warm: libraries are in memory by then. Each command ran once per line; "
    "accuracy is that of the test split, from one seed, on which no line depends."
)
PHASES = {
    "start": "start",
    "decode": "decode",
    "features": "features",
    "stage1": "stage 1",
    "stage2": "stage 2",
    "validation": "validation",
    "probe": "linear probe",
    "saving": "saving",
}
OTHER = "other"
BASELINES = ("plain", "upstream's loop")  # whose total the others are compared with
BASELINES_IMPORT = ("timm, torchvision, torch._dynamo", "open_clip")
COLD, WARM = "cold", "warm"
TIMEOUT = 900  # seconds for one command
SMALL_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 3, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}
VIT_B_16 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 512,
        "heads": 8,
        "layers": 12,
    },
}


@dataclass(frozen=True)
class Size:
    """How large the jobs are.

    Attributes:
        images: the largest number of images.
        backbone: timm's name of a convolutional network; GDPL's domain encoder, too.
        image_size: height and width in pixels.
        rank: of the adapter.
        epochs: of stage 1.
        epochs2: of stage 2.
        batch_size: of both stages.
        clip: open_clip's configuration of the CLIP model.
        depth: layers of CLIP that get prompts and low-rank updates.
        gdpl_epochs: of GDPL, with ``shots`` images of each class in batches of 4.
        shots: training images of each class.
    """

    images: int
    backbone: str
    image_size: int
    rank: int
    epochs: int
    epochs2: int
    batch_size: int
    clip: dict[str, Any] = field(hash=False)
    depth: int
    gdpl_epochs: int
    shots: int


FULL = Size(2624, "tf_efficientnet_lite0", 300, 64, 30, 10, 32, VIT_B_16, 9, 15, 16)
QUICK = Size(48, "test_efficientnet", 64, 8, 1, 1, 8, SMALL_CLIP, 3, 1, 4)


@dataclass(frozen=True)
class Command:
    """One way to do a job.

    Attributes:
        job: what is done.
        provider: who does it.
        start: ``COLD`` or ``WARM``.
        arguments: of the interpreter, without ``--out``.
    """

    job: str
    provider: str
    start: str
    arguments: tuple[str, ...]


def commands(size: Size, folder: Path) -> list[Command]:
    """Return all commands in the order of a run; their files are in ``folder``."""
    # As many worker processes as the page of a user would have.
    workers = str(min(8, os.cpu_count() or 1))
    shared = (
        str(folder / "data.csv"),
        *("--backbone", size.backbone),
        *("--weights", str(folder / "backbone.safetensors")),
        *("--image-size", str(size.image_size)),
        *("--rank", str(size.rank)),
        *("--epochs", str(size.epochs)),
        *("--epochs2", str(size.epochs2)),
        *("--batch-size", str(size.batch_size)),
    )
    train: tuple[str, ...] = (
        "-m",
        "fastadapt",
        "train",
        *shared,
        "--no-probe",  # the plain page fits none
        "--stages",
        "2",
        "--crop-pct",
        "1",
        # What the page has: the paper's adapter, AdamW as PyTorch has it.
        *("--mlp-ratio", "4", "--lr", "1e-3", "--weight-decay", "0.01", "--label-smoothing", "0"),
    )
    train += profile_option("train")
    page = (str(Path(image_classifier.__file__)), *shared, "--workers", workers)
    job = "two stages"
    found = [
        Command(job, "ours", COLD, train),
        Command(job, "plain", WARM, page),
        Command(job, "plain, cached by hand", WARM, (*page, "--cache")),
        Command(job, "ours", WARM, train),
    ]
    gdpl = (
        *("-m", "fastadapt", "gdpl", str(folder / "data.csv"), "--train-classes", "all"),
        *("--clip", f"local-dir:{folder / 'clip'}", "--prompt-depth", str(size.depth)),
        *("--domain-encoder", size.backbone),
        *("--domain-weights", str(folder / "backbone.safetensors")),
        *("--shots", str(size.shots), "--epochs", str(size.gdpl_epochs)),
        *profile_option("gdpl"),
    )
    loop = (
        *("-m", f"{__package__.rpartition('.')[0]}.plain.gdpl_loop", str(folder / "data.csv")),
        *("--clip", f"local-dir:{folder / 'clip'}", "--depth", str(size.depth)),
        *("--encoder", size.backbone),
        *("--encoder-weights", str(folder / "backbone.safetensors")),
        *("--shots", str(size.shots), "--epochs", str(size.gdpl_epochs), "--workers", workers),
    )
    job = "GDPL"
    return [
        *found,
        Command(job, "ours", COLD, gdpl),
        Command(job, "upstream's loop", WARM, loop),
        Command(job, "ours", WARM, gdpl),
    ]


def run(quick: bool = False) -> Iterator[Tables]:
    """Run every command; yield the table after each."""
    harness.release()  # a command has the GPU for itself, but for this process's context
    size = QUICK if quick or not torch.cuda.is_available() else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, kind = job_files.write_data(folder, size.images)
        job_files.write_backbone(folder / "backbone.safetensors", size.backbone)
        job_files.write_clip(folder / "clip", size.clip)
        cores = os.cpu_count()
        notes = [
            NOTES,
            f"Data: {kind}; {size.backbone} at {size.image_size}, rank {size.rank}, "
            f"{size.epochs} + {size.epochs2} epochs, batch {size.batch_size}; {cores} cores.",
        ]
        todo = commands(size, folder)
        timelines: list[Timeline] = []
        for index, command in enumerate(todo):
            if index == 1:
                compile_imports(folder)
            try:
                line = execute(command, folder / f"out{index}", folder)
            except CommandError as error:
                if command.provider == "ours":
                    raise
                notes.append(f"{command.job}, {command.provider}: {error}")
                continue
            timelines.append(line)
            yield Tables(
                tables(timelines),
                notes=notes,
                left_out=[
                    f"{c.job}, {c.provider}, {c.start}: the run ended before it"
                    for c in todo[index + 1 :]
                ],
                timelines=list(timelines),
                progress=f"{command.job}, {command.provider}: {line.total:.1f} s",
            )


class CommandError(Exception):
    """A command failed; the message is the last line that it printed."""


def execute(command: Command, out: Path, folder: Path) -> Timeline:
    """Run a command and return its phases.

    Args:
        command: what to run.
        out: its ``--out``.
        folder: for its log, and for caches of compiled kernels.

    Raises:
        CommandError: it failed, or took too long.
    """
    caches = {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        **bytecode(folder),
    }
    arguments = [sys.executable, *command.arguments, "--out", str(out)]
    log = folder / f"{out.name}.log"
    started = time.time()
    environment = os.environ | caches | {image_classifier.STARTED: repr(started)}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                arguments, stdout=file, stderr=file, check=False, env=environment, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise CommandError(f"not done after {TIMEOUT} s") from None
    total = time.time() - started
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise CommandError(f"exit code {done.returncode}: {lines[-1]}")
    seconds = phases(out)
    seconds[OTHER] = max(0.0, total - sum(seconds.values()))
    return Timeline(
        command.job, command.provider, command.start, seconds, total, accuracy=accuracy(out)
    )


def bytecode(folder: Path) -> dict[str, str]:
    """Return the environment in which Python keeps what it compiles in the folder.

    As an installation by pip has it. Images of machines often come without, and allow no writing.
    """
    return {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}


def compile_imports(folder: Path) -> None:
    """Import what the baselines import, so that their bytecode is warm."""
    for modules in BASELINES_IMPORT:
        code = f"import {modules}"
        subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            env=os.environ | bytecode(folder),
            capture_output=True,
            timeout=TIMEOUT,
        )


@functools.cache
def profile_option(command: str) -> tuple[str, ...]:
    """Return ``--profile`` where a command of ours has it."""
    arguments = [sys.executable, "-m", "fastadapt", command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    return ("--profile",) if "--profile" in done.stdout else ()


def phases(out: Path) -> dict[str, float]:
    """Return the seconds of each phase by its title, from ``profile.json`` or else metrics.

    ``metrics.jsonl`` holds the seconds of each epoch, validation included; what is before, between
    and after them is not told apart then.
    """
    if (out / "profile.json").is_file():
        found = json.loads((out / "profile.json").read_text())
    else:
        found = {}
        for line in (out / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            name = f"stage{row.get('stage', 1)}"
            found[name] = found.get(name, 0.0) + row["seconds"]
    return {title: found[name] for name, title in PHASES.items() if found.get(name)}


def accuracy(out: Path) -> float | None:
    """Return the accuracy on the test split that a command wrote, if it wrote one."""
    profile, results = {}, {}
    if (out / "profile.json").is_file():
        profile = json.loads((out / "profile.json").read_text())
    if (out / "results.json").is_file():
        results = json.loads((out / "results.json").read_text())
    if "accuracy" in profile:
        return profile["accuracy"]
    metrics = results.get("metrics", {"test": results.get("test", {})})
    return next((found["accuracy"] for found in metrics.values() if "accuracy" in found), None)


def tables(timelines: list[Timeline]) -> dict[str, list[Row]]:
    """Return a table for each job, a row for each command."""
    found: dict[str, list[Row]] = {}
    for line in timelines:
        title = f"{line.job}: seconds of each phase"
        found.setdefault(title, []).append(_row(line, timelines))
    return found


def _row(line: Timeline, timelines: list[Timeline]) -> Row:
    row: Row = {"command": line.provider, "caches": line.start}
    for title in (*PHASES.values(), OTHER):
        if any(title in other.seconds for other in timelines if other.job == line.job):
            value = line.seconds.get(title)
            row[title] = None if value is None else f"{value:.2f}"
    row["total"] = f"{line.total:.1f}"
    for other in timelines:
        if other.job == line.job and other.provider in BASELINES:
            row[f"times as fast as {other.provider}"] = f"{other.total / line.total:.2f}×"
    row["test accuracy"] = None if line.accuracy is None else f"{line.accuracy:.1%}"
    return row


BENCHMARK = Benchmark(TITLE, NOTES, run, slow=True)
