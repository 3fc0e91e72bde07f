"""Time prediction from image files: decoder alone, runtime alone, and both as ``predict`` runs.

On a CPU decoder and runtime share the cores, so that no program can be faster than
1 / (1 / decoder + 1 / runtime), each measured alone on all cores; on a GPU the slower of the two is
the limit. Each round measures all of them, one after the other; ratios are of one round, and their
median counts.

With several GPUs ``--devices`` and Ray Data are timed on 1, 2, 4 … of them, with the same number of
decoding processes for each GPU. The environment variable ``FASTADAPT_PREDICT`` chooses parts: a
regular expression that is searched for in "alone", "memory", "devices" and "ray".
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastadapt.data.decode_on import DecodeOn
from fastadapt.data.decode_pool import default_workers
from fastadapt.export.predict.decode_ahead import open_decoder
from fastadapt.export.predict.decoders import decoder_on
from fastadapt.export.predict.job import Job, Pool
from fastadapt.export.predict.models import ImageModel
from fastadapt.export.predict.part_maker import Todo
from fastadapt.export.predict.request import Request
from fastadapt.export.predict.settings import EmbedSettings, PredictSettings, WorkSettings
from fastadapt.export.predict.sources import ImageList

from .. import harness
from ..predict_files import write_bundle, write_photos
from ..protocol import Benchmark, Row, Tables

TITLE = "Prediction from image files"
NOTES = (
    "Images per second from JPEGs of 500 × 375 pixels that are in the file cache, from the first "
    "image to the last row on disk, without the start of Python and the loading of the model; on "
    "several GPUs from when all workers are busy. "
    "Random weights, ten classes."
)
CHOICE = "FASTADAPT_PREDICT"
# By how their titles begin.
PARTS = {
    "alone": "one device",
    "memory": "memory",
    "devices": "several GPUs",
    "ray": "Ray Data on several GPUs",
}
EXECUTORS = {"devices": "--devices", "ray": "Ray Data"}  # of the parts on several GPUs
FEW = 100  # images of the small one of two memory measurements


@dataclass(frozen=True)
class Size:
    """How large the work is.

    Attributes:
        backbone: timm's name.
        image_size: of its images, in pixels.
        images: of a timed run on one device.
        each: images for each of several GPUs, whose workers do not begin at the same time.
        rounds: of timing.
        many: images of the large one of two memory measurements.
        batch: images that are computed at once.
    """

    backbone: str
    image_size: int
    images: int
    each: int
    rounds: int
    many: int
    batch: int


ON_GPU = Size("vit_base_patch16_224", 224, 20_000, 80_000, 3, 10_000, 256)
ON_CPU = Size("tf_efficientnet_lite0", 224, 600, 600, 5, 10_000, 32)
QUICK = Size("test_vit", 160, 24, 48, 1, 48, 8)


def run(quick: bool = False) -> Iterator[Tables]:
    """Measure part by part; yield the tables after each."""
    on_gpu = torch.cuda.is_available()
    size = QUICK if quick else ON_GPU if on_gpu else ON_CPU
    choice = re.compile(os.environ.get(CHOICE, ""), re.IGNORECASE)
    chosen = [part for part in PARTS if choice.search(part)]
    about = tuple(title for part, title in PARTS.items() if part in chosen)
    several = {"devices", "ray"} & set(chosen)
    count = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = folder / "photos"
        most = max(size.images, size.each * max(count, 2) if several else 0, size.many)
        write_photos(photos, most)
        bundle = write_bundle(
            folder, size.backbone, photos, size=size.image_size, compiled=on_gpu and not quick
        )
        work = _Work(bundle, photos, folder, size)
        cores = f"{default_workers()} cores"
        found: dict[str, list[Row]] = {}  # what each part has so far
        notes = [NOTES, f"{size.backbone} at {size.image_size}, batch {size.batch}; {cores}."]
        for part, measure in (
            ("alone", alone),
            ("memory", memory),
            ("devices", functools.partial(devices, part="devices")),
            ("ray", functools.partial(devices, part="ray")),
        ):
            if part in chosen:
                for table, rows in measure(work):
                    found[table] = rows
                    said = ", ".join(str(value) for value in rows[-1].values() if value)
                    yield Tables(dict(found), notes=notes, about=about, progress=said)
        harness.release()


@dataclass(frozen=True)
class _Work:
    """Bundle, images and sizes of the measurements."""

    bundle: Path
    photos: Path
    folder: Path
    size: Size

    def settings(self, images: int, **more: Any) -> WorkSettings:
        """Return the settings of a job on the first images."""
        file = self.folder / "images.txt"
        names = sorted(path.name for path in self.photos.iterdir())[:images]
        file.write_text("".join(f"{self.photos / name}\n" for name in names))
        return WorkSettings(
            images=(str(file),),
            out=self.folder / "out.csv",
            batch=self.size.batch,
            quiet=True,
            overwrite=True,
            **more,
        )


class Timed:
    """A pool, and the speed once the pieces of work that it began with have ended.

    What starts with the work (Ray's workers load their model then) is left out, and what several
    workers had begun together is not counted as if it were made one after the other.

    Args:
        pool: what computes.
        begins: pieces of work that are begun at once.
    """

    def __init__(self, pool: Pool, begins: int):
        self.pool, self.images, self._warming = pool, 0, begins
        self.first = self.last = 0.0

    def run(self, todo: Todo, advance: Callable[[int], Any]) -> None:
        """Compute all parts."""

        def note(images: int) -> None:
            self.last = time.perf_counter()
            if self._warming:
                self._warming -= 1
                self.first = self.last
            else:
                self.images += images
            advance(images)

        self.pool.run(todo, note)

    @property
    def speed(self) -> float | None:
        """Images per second; None if nothing was left to time."""
        return self.images / (self.last - self.first) if self.images else None


def alone(work: _Work) -> Iterator[tuple[str, list[Row]]]:
    """Time the decoder, the runtime, and predict and embed, which use both; yield each round."""
    size = work.size
    predict = Request(PredictSettings(model=str(work.bundle)))
    embed = Request(EmbedSettings(model=str(work.bundle)))
    models = {name: r.open("auto") for name, r in (("predict", predict), ("embed", embed))}
    settings = work.settings(size.images)
    paths = [item.path for item in ImageList(settings.images)]
    on_gpu = torch.cuda.is_available()
    jobs: list[tuple[str, str, DecodeOn]] = [
        ("predict", "predict", "cpu"),
        ("embed", "embed", "cpu"),
    ]
    jobs += [("predict, decoding on the GPU", "predict", "gpu")] * on_gpu
    table = f"one device, {models['predict'].name}: {size.images} images, {size.rounds} rounds"
    results: dict[str, list[str]] = {}
    rounds: dict[str, list[Timing]] = {}
    for _ in range(size.rounds):
        rounds.setdefault("decoder", []).append(decode_alone(models["predict"], paths, work))
        rounds.setdefault("runtime", []).append(run_alone(models["predict"], paths, size.batch))
        if on_gpu:
            timing = decode_alone(models["predict"], paths, work, "gpu")
            rounds.setdefault("decoder on the GPU", []).append(timing)
        for name, command, place in jobs:
            model, request = models[command], predict if command == "predict" else embed
            images = ImageList(settings.images, classes=model.classes)
            decoder = decoder_on(place, "auto")
            job = Job(model, images, request.columns(model), settings, request.identity, decoder)
            began = Clock()
            summary = job.run()
            assert summary.images == size.images and not summary.unreadable
            rounds.setdefault(name, []).append(began.timing(summary.images))
            results[name] = predictions_of(summary.out) if command == "predict" else []
        yield table, rows_of(rounds, on_gpu=on_gpu)
    if on_gpu:
        pairs = list(zip(results["predict"], results["predict, decoding on the GPU"], strict=True))
        same = sum(one == other for one, other in pairs)
        yield "decoding on the GPU", [{"images": f"{len(pairs)}", "same class": f"{same}"}]


def predictions_of(path: Path) -> list[str]:
    """Return the classes of a CSV that predict wrote."""
    with path.open(encoding="utf-8", newline="") as lines:
        return [row["prediction"] for row in csv.DictReader(lines)]


class Timing(NamedTuple):
    """Images per second, and milliseconds of all processes' CPU time for each image."""

    speed: float
    cpu: float


class Clock:
    """Wall time and CPU time since it was made, that of processes that have ended included."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), sum(os.times()[:4])

    def timing(self, images: int) -> Timing:
        """Return what a number of images took since then."""
        wall, cpu = time.perf_counter() - self.wall, sum(os.times()[:4]) - self.cpu
        return Timing(images / wall, 1000 * cpu / images)


def rows_of(rounds: dict[str, list[Timing]], on_gpu: bool) -> list[Row]:
    """Return a row for each thing that was timed, with medians over rounds.

    Args:
        rounds: timings of "decoder", "runtime", "predict" and "embed", one for each round.
        on_gpu: decoder and runtime have processors of their own, and the slower one is the limit.
    """
    both = list(zip(rounds["decoder"], rounds["runtime"], strict=True))
    limits = [min(d.speed, r.speed) if on_gpu else 1 / (1 / d.speed + 1 / r.speed) for d, r in both]
    what = "the slower of both" if on_gpu else "1 / (1/decoder + 1/runtime)"
    rows = []
    for name, timings in rounds.items():
        used = name.startswith(("predict", "embed"))
        ratio = statistics.median(t.speed / most for t, most in zip(timings, limits, strict=True))
        cpu = statistics.median(t.cpu for t in timings)
        parts = statistics.median(
            (d.cpu + r.cpu) / t.cpu for t, (d, r) in zip(timings, both, strict=True)
        )
        row: Row = {
            "what": name,
            "images/s": f"{statistics.median(t.speed for t in timings):.0f}",
            "rounds": " ".join(f"{t.speed:.0f}" for t in timings),
            f"of {what}": f"{ratio:.3f}" if used else None,
            "CPU ms per image": f"{cpu:.2f}",
        }
        if not on_gpu:  # where other programs run, too, this says more than times do
            row["CPU time of decoder + runtime over it"] = f"{parts:.3f}" if used else None
        rows.append(row)
    return rows


def decode_alone(
    model: ImageModel, paths: list[str], work: _Work, place: DecodeOn = "cpu"
) -> Timing:
    """Decode all images as predict does, and throw the pixels away."""
    batch = work.size.batch
    starts = range(0, len(paths), batch)
    began = Clock()
    open_on = decoder_on(place, "auto")
    with open_on(model.reading, model.value_range, batch, default_workers()) as decode:
        for decoded in decode(paths[start : start + batch] for start in starts):
            for _ in decoded.groups:
                pass
            assert not decoded.problems
    return began.timing(len(paths))


def run_alone(model: ImageModel, paths: list[str], batch: int) -> Timing:
    """Run the model on decoded images over and over."""
    with open_decoder(model.reading, model.value_range, batch, 1) as decode:
        decoded = next(iter(decode([paths[:batch]])))
        pixels = next(iter(decoded.groups))[1].copy()
    model.run(pixels)
    calls = -(-len(paths) // batch)
    began = Clock()
    for _ in range(calls):
        model.run(pixels)
    return began.timing(calls * len(pixels))


def memory(work: _Work) -> Iterator[tuple[str, list[Row]]]:
    """Measure the most memory that ``fastadapt predict`` takes, for few images and for many."""
    peaks, rows = list[int](), list[Row]()
    for images in (FEW, work.size.many):
        settings = work.settings(images)
        command = [sys.executable, "-m", "fastadapt", "predict", str(work.bundle)]
        command += [*settings.images, "--out", str(settings.out), "--overwrite", "--quiet"]
        command += ["--batch", str(settings.batch)]
        process = subprocess.Popen(command, start_new_session=True)
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.05)
        assert process.returncode == 0, process.returncode
        peaks.append(peak)
        row: Row = {"images": str(images), "peak MiB": f"{peak / 2**20:.0f}"}
        row["more than for few, MiB"] = f"{(peak - peaks[0]) / 2**20:+.0f}"
        rows.append(row)
        yield "memory of predict and its decoding processes", list(rows)


def tree_memory(pid: int) -> int:
    """Return the bytes that a process and its descendants have in memory, shared ones once."""
    total = 0
    with suppress(OSError, ValueError, IndexError):  # processes end while one looks
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += tree_memory(int(child))
    return total


def devices(work: _Work, part: str) -> Iterator[tuple[str, list[Row]]]:
    """Time ``--devices`` or Ray Data on 1, 2, 4 … GPUs, as many images for each."""
    executor = EXECUTORS[part]
    count = torch.cuda.device_count() or (2 if work.size is QUICK else 0)
    if count < 2 or (part == "ray" and importlib.util.find_spec("ray") is None):
        return
    request = Request(PredictSettings(model=str(work.bundle)))
    each = max(default_workers() // count, 1)
    one: float | None = None
    rows = list[Row]()
    for number in [n for n in (1, 2, 4, 8) if n <= count]:
        settings = work.settings(work.size.each * number)
        began = time.perf_counter()
        with open_pool(executor, number, each, request, settings) as pool:
            timed = Timed(pool, number * at_once(executor))
            images = ImageList(settings.images, classes=pool.model.classes)
            columns = request.columns(pool.model)
            job = Job(pool.model, images, columns, settings, request.identity, pool=timed)
            summary = job.run()
        seconds = time.perf_counter() - began
        assert summary.images == work.size.each * number and not summary.unreadable
        one = one or timed.speed
        row: Row = {
            "executor": executor,
            "GPUs": str(number),
            "images": str(summary.images),
            "images/s": f"{timed.speed:.0f}" if timed.speed else None,
            "times one GPU": f"{timed.speed / one:.2f}×" if timed.speed and one else None,
            "with the start, s": f"{seconds:.1f}",
        }
        rows.append(row)
        yield f"{PARTS[part]}, {each} decoding processes for each", list(rows)


def at_once(executor: str) -> int:
    """Return the pieces of work that a worker begins with: a batch, or several parts."""
    if executor == "--devices":
        return 1
    from fastadapt.export.predict.ray_executor import AT_ONCE

    return AT_ONCE


def open_pool(
    executor: str, number: int, each: int, request: Request, settings: WorkSettings
) -> Any:
    """Open the processes or Ray's workers that compute.

    Args:
        executor: ``"--devices"`` or ``"Ray Data"``.
        number: of GPUs.
        each: decoding processes for each GPU.
        request: the model and the columns.
        settings: of the job.
    """
    if executor == "--devices":
        from fastadapt.export.predict.devices import DevicePool

        on_gpu = torch.cuda.is_available()
        names = tuple(f"cuda:{index}" if on_gpu else "cpu" for index in range(number))
        return DevicePool(request, replace(settings, devices=names, workers=each * number))
    from ray.data import DataContext

    from fastadapt.export.predict.ray_executor import RayPool

    # All workers have loaded their model before the first begins, as with --devices.
    context = DataContext.get_current()
    context.wait_for_min_actors_s = 120
    ray = replace(settings, executor="ray", ray_workers=number, workers=each)
    return RayPool(request, ray)


BENCHMARK = Benchmark(TITLE, NOTES, run, slow=True)
