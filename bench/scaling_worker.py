"""Measure training steps in one process of a job: ``bench/suites/scaling.py`` starts it.

    torchrun --nproc-per-node 2 -m fastadapt.bench.scaling_worker PLAN.json

Images come from the trainer's own source, decoded and kept in memory; steps are the trainer's,
captured where there is a GPU. The first process writes what it found to ``PLAN.json``'s ``out``.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import fastadapt as fa
from fastadapt.adapted_model import AdaptedModel
from fastadapt.data.dataset import read_dataset
from fastadapt.data.images import ImageSource
from fastadapt.data.preprocess import Preprocess
from fastadapt.files import write_json
from fastadapt.processes import Processes, place_from_environment
from fastadapt.train.config import TrainConfig
from fastadapt.train.devices import device_of_process, parse_device, together
from fastadapt.train.gradient_sum import BUCKET_BYTES
from fastadapt.train.optimizer import make_optimizer
from fastadapt.train.step import training_step

WARM = 8  # steps before the first that counts: three run eagerly, then one is captured
LR = 1e-6
LONGEST = 150  # seconds


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        data: the images.
        backbone: timm's name; random weights.
        out: where the results go.
        batches: images of a step, of all processes together.
        steps: that are timed together.
        repeats: how often.
        image_size: height and width; the backbone's if None.
    """

    data: str
    backbone: str
    out: str
    batches: tuple[int, ...]
    steps: int = 30
    repeats: int = 3
    image_size: int | None = None


@dataclass
class Found:
    """What one kind of step took.

    Attributes:
        stage: 1 or 2.
        processes: that took it together.
        batch: images of all processes.
        milliseconds: of a step.
        alone: milliseconds of a step without the exchange of gradients; None for one process.
        captured: whether it was replayed from a graph.
        gradients: MiB that are summed.
    """

    stage: int
    processes: int
    batch: int
    milliseconds: float
    alone: float | None
    captured: bool
    gradients: float

    @property
    def images(self) -> float:
        """Images per second."""
        return self.batch / self.milliseconds * 1e3


def measure(plan: Plan, processes: Processes, device: torch.device) -> dict[str, Any]:
    """Time the steps of both stages; return what was found."""
    torch.manual_seed(0)
    size = None if plan.image_size is None else (3, plan.image_size, plan.image_size)
    model = fa.adapt(plan.backbone, fa.AdaptConfig(input_size=size), 10, pretrained=False)
    model.to(device).to(memory_format=torch.channels_last)
    samples = read_dataset(plan.data, 0.05, 0).split("train")
    preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg)
    source = ImageSource(samples, preprocess, device, processes=processes)
    found = []
    for stage in (1, 2):
        if stage == 2:
            model.unfreeze()
        for batch in plan.batches:
            found.append(_measure(plan, processes, model, source, stage, batch))
    rates = {}
    if processes.place.size > 1:
        for count in (BUCKET_BYTES, 256 << 20):
            rates[f"{count >> 20} MiB"] = _sum_rate(count, device)
    return {"steps": [asdict(item) for item in found], "sums, GB/s": rates}


def _measure(
    plan: Plan,
    processes: Processes,
    model: AdaptedModel,
    source: ImageSource,
    stage: int,
    batch: int,
) -> Found:
    complaints: list[str] = []
    model.train()
    times = {}
    # Without the exchange first: its hooks stay on the parameters until the next one's.
    for together_ in (False, True) if processes.place.size > 1 else (False,):
        sums = processes.gradient_sum(model) if together_ else None
        step = training_step(
            model,
            make_optimizer(model, TrainConfig(lr=LR)),
            _autocast(source.device),
            graph=True,
            say=complaints.append,
            sums=sums,
        )
        times[together_] = _time(plan, processes, source, batch, step)
        if sums is not None:
            sums.close()
        del step
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    several = len(times) > 1
    return Found(
        stage,
        processes.place.size,
        batch,
        times[several],
        times[False] if several else None,
        source.device.type == "cuda" and not complaints,
        trained / 2**20,
    )


def _time(
    plan: Plan,
    processes: Processes,
    source: ImageSource,
    batch: int,
    step: Callable[..., Any],
) -> float:
    """Return the milliseconds of a step: the median of the repeats, of the slowest process."""
    feed = _endless(processes, source, batch)

    def take(count: int) -> None:
        for _ in range(count):
            inputs, labels = next(feed)
            step(LR, labels, inputs)
        if source.device.type == "cuda":
            torch.cuda.synchronize(source.device)

    take(WARM)
    spans = []
    for _ in range(plan.repeats):
        processes.gather(None)
        began = time.perf_counter()
        take(plan.steps)
        spans.append(max(processes.gather((time.perf_counter() - began) / plan.steps)))
    return float(np.median(spans)) * 1e3


def _endless(
    processes: Processes, source: ImageSource, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's pieces of full batches, pass after pass."""
    count, view = len(source.labels), 0
    while True:
        order = np.random.default_rng(view).permutation(count)[: count // batch * batch]
        share = processes.share(order, batch)
        yield from source.batches(share.order, None, share.batch_size)
        view += 1


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager]:
    if device.type != "cuda":
        return nullcontext
    return lambda: torch.autocast("cuda", dtype=torch.bfloat16)


def _sum_rate(count: int, device: torch.device) -> float:
    """Return GB/s at which buffers of ``count`` bytes are summed, one after the other."""
    buffer = torch.zeros(count // 4, device=device)
    repeats, times = 8, []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return count * repeats / min(times) / 1e9


def main() -> None:
    """Measure what the plan says, in this process."""
    # Processes that wait for each other say where.
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text()))
    place = place_from_environment()
    device = parse_device("auto" if place.size == 1 else device_of_process("auto", place))
    with together(device) as processes:
        found = measure(plan, processes, device)
        if processes.first:
            write_json(Path(plan.out), found)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
