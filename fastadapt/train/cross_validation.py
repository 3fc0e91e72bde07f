"""Train on folds and with several seeds, where features and images are computed once for all.

1. Images are scanned once, and folds drawn: those with the same bytes, or of one group, together.
2. The frozen backbone's features of all images are computed once, and stay on the device.
3. Every run takes the rows of its splits; it is an ordinary run folder, ``OUT/fold-1`` for one.
4. What the runs predicted for images that they did not see is put together.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadapt.adapted_model import adapt
from fastadapt.config import AdaptConfig
from fastadapt.data.dataset import Dataset
from fastadapt.data.decode_on import check_decode
from fastadapt.data.decode_pool import default_workers
from fastadapt.data.images import ImageSource
from fastadapt.data.scan import Scan, Scanned
from fastadapt.device_list import check_one_way, expand_devices
from fastadapt.files import write_json
from fastadapt.locks import lock_folder
from fastadapt.output_place import check_output
from fastadapt.progress import progress_bars
from fastadapt.train.config import DEFAULT_ADAPTER, TrainConfig
from fastadapt.train.devices import parse_device
from fastadapt.train.ensemble_fit import fit_ensemble
from fastadapt.train.feature_cache import CacheSettings, CacheWriter, cached_source
from fastadapt.train.fold_plan import check_out, parts_of, plan_of, remove_others
from fastadapt.train.fold_results import (
    FOLDS,
    FORMAT,
    FORMAT_VERSION,
    FoldsResult,
    PlannedRun,
    summarize,
    write_summary,
)
from fastadapt.train.fold_settings import FoldSettings, dataset_of
from fastadapt.train.jobs import Job, run_jobs
from fastadapt.train.kernels_ahead import begin_kernels
from fastadapt.train.phases import Phases
from fastadapt.train.precision import precision
from fastadapt.train.request import REQUEST, Request
from fastadapt.train.results import TrainResult, score_line
from fastadapt.train.run import (
    Circumstances,
    Prepared,
    full_disk_or_memory,
    prepare,
    run_prepared,
    scanned,
)
from fastadapt.train.run_folder import CACHE, CONFIG, RESULTS, check_folder, check_settings
from fastadapt.train.shared_sources import SharedSources


def train_folds(
    data: str | Path,
    out: str | Path,
    backbone: str | nn.Module,
    config: TrainConfig | None = None,
    adapt_config: AdaptConfig | None = None,
    folds: FoldSettings | None = None,
    *,
    preprocess: dict[str, Any] | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    skip_unreadable: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    save_every: float = 30.0,
    scan: Scan | None = None,
    only: Sequence[int] | None = None,
) -> FoldsResult:
    """Train once for each fold and seed, and put the held-out results together.

    The folder holds a run folder for each (``fold-1`` …, ``fold-1-seed-3`` …, or ``seed-3`` …
    without folds), ``folds.json`` and ``folds.csv`` with all scores, means and intervals,
    ``splits.csv`` with each image's fold, and ``cache/``.

    Folds are drawn from ``config.seed``, by class, with all images of a group (the CSV's column
    ``group``) and all copies of an image in one fold; or they are the CSV's column ``fold``. The
    fold that is held out tests, the next one validates (see :mod:`fastadapt.data.folds`). Where
    pixel values are scaled by what is found (``intensity_range``), that is found in all images.

    Args:
        data: as for :func:`fastadapt.data.dataset.read_dataset`; without splits for folds.
        out: the folder; new or empty, unless ``resume`` or ``overwrite``.
        backbone, config, adapt_config: as for :func:`fastadapt.train.train`.
        folds: how many folds, which seeds, and on which devices; five folds if ``None``. With
            several devices runs train beside each other, in processes of their own.
        preprocess, pretrained, weights, device, workers, skip_unreadable, quiet, save_every: as for
            :func:`fastadapt.train.train`.
        resume: leave finished runs as they are, and go on with the others.
        overwrite: replace all runs.
        scan: of the whole data, begun before; the caller closes its processes.
        only: numbers of the runs to train here, where another process holds the folder, has
            computed the features and puts the results together.

    Raises:
        InputError: as for :func:`fastadapt.train.train`; folds that cannot be drawn.
    """
    config, out = config or TrainConfig(), check_output(out, "folder", "a folder of runs")
    folds = FoldSettings(folds=5) if folds is None else folds
    seeds = folds.seeds or (config.seed,)
    devices: tuple[str, ...] = ()
    if folds.devices and only is None:
        check_one_way(device, folds.devices)
        devices = expand_devices(folds.devices)
    before = check_out(out, folds, resume, overwrite) if only is None else None
    target = parse_device(devices[0] if devices else device)
    amp = precision(config.amp, target)
    check_decode(config.decode, target)
    workers = default_workers() if workers is None else workers
    begun = scan or Scan(dataset_of(data, config, folds), workers, config.intensity_range)
    models = _Models(
        begun,
        backbone,
        config,
        adapt_config or AdaptConfig(**DEFAULT_ADAPTER),
        preprocess=preprocess,
        pretrained=pretrained,
        weights=weights,
    )
    try:
        with ExitStack() as stack:
            if only is None:
                stack.enter_context(lock_folder(out))
                check_out(out, folds, resume, overwrite)  # again: no other process writes now
            progress = stack.enter_context(progress_bars(quiet or only is not None))
            first = models.prepared(seeds[0])  # settings that do not fit are refused now
            kernels = begin_kernels(first.model, config, target, amp, first.cached)
            found = scanned(begun, progress, skip_unreadable=skip_unreadable)
            if kernels is not None:
                kernels.join()
            numbers, parts = parts_of(found, folds, config.seed, progress)
            plan = plan_of(folds, seeds)
            described: dict[str, Any] = {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "finished": False,
                "folds": folds.folds,
                "seeds": list(seeds),
                "classes": list(found.dataset.classes),
                "data": str(Path(data).absolute()),
                "fingerprint": found.dataset.fingerprint(),
            }
            if before is not None:
                now, then = (
                    {"folds": each["folds"], "data": each["fingerprint"]}
                    for each in (described, before)
                )
                check_settings(now, then, out)
            request = Request(
                described["data"],
                backbone if isinstance(backbone, str) else None,
                config,
                adapt_config,
                preprocess or {},
                pretrained,
                None if weights is None else str(Path(weights).absolute()),
                skip_unreadable,
            )
            with full_disk_or_memory(out):
                if only is None:
                    out.mkdir(parents=True, exist_ok=True)
                    write_json(out / FOLDS, described)
                    replace(request, folds=replace(folds, devices=None)).write(out)
                work = _Work(
                    models=models,
                    config=config,
                    found=found,
                    where=Circumstances(
                        request,
                        out,
                        target,
                        workers,
                        # Bars are the first process's; lines are of whoever trains.
                        progress if only is None else progress_bars(quiet),
                        save_every=save_every,
                        pool=begun.pool,
                    ),
                    resume=resume,
                    overwrite=overwrite,
                )
                if only is not None:
                    mine = [plan[number] for number in only]
                    work.run(mine, parts, models.prepared(mine[0].seed))
                    return FoldsResult(out, tuple(out / run.folder for run in mine), {})
                if len(devices) > 1 and len(plan) > 1:
                    work.prepare(first)
                    shares = [range(k, len(plan), len(devices)) for k in range(len(devices))]
                    run_jobs(
                        train_folds,
                        [
                            Job(
                                ", ".join(plan[number].folder for number in share),
                                {
                                    "data": data,
                                    "out": out,
                                    "backbone": backbone,
                                    "config": config,
                                    "adapt_config": adapt_config,
                                    "folds": folds,
                                    "preprocess": preprocess,
                                    "pretrained": pretrained,
                                    "weights": weights,
                                    "workers": max(workers // len(devices), 1),
                                    "skip_unreadable": skip_unreadable,
                                    "resume": resume,
                                    "overwrite": overwrite,
                                    "quiet": quiet,
                                    "save_every": save_every,
                                    "only": tuple(share),
                                },
                            )
                            for share in shares
                            if share
                        ],
                        devices,
                    )
                else:
                    work.run(plan, parts, first)
                summary = summarize(out, plan, found.dataset, described, found.value_range)
                summary["ensemble"] = fit_ensemble(out, summary)
                write_summary(out, summary, found.dataset, numbers)
                (out / REQUEST).unlink(missing_ok=True)
                if overwrite:
                    remove_others(out, plan)
    finally:
        if begun.pool is not None and scan is None:
            begun.pool.close()
    return FoldsResult(out, tuple(out / run.folder for run in plan), summary)


@dataclass
class _Models:
    """Make one model after the other, of the same pretrained backbone."""

    scan: Scan
    backbone: str | nn.Module
    config: TrainConfig
    adapt_config: AdaptConfig
    preprocess: dict[str, Any] | None
    pretrained: bool
    weights: str | Path | None

    def __post_init__(self) -> None:
        classes = len(self.scan.dataset.classes)
        weights = None if self.weights is None else str(Path(self.weights).absolute())
        torch.manual_seed(self.config.seed)
        bare = adapt(
            self.backbone,
            replace(self.adapt_config, lora=None),
            classes,
            pretrained=self.pretrained,
            weights=weights,
        )
        self.source = bare.source
        self.random = isinstance(self.backbone, str) and not self.pretrained and weights is None
        self.pristine = bare.backbone
        self.shares = False  # one backbone for all, which nothing changes

    def prepared(self, seed: int) -> Prepared:
        """Return a model with new weights beside the backbone's."""
        module = self.pristine if self.shares else copy.deepcopy(self.pristine)
        found = prepare(
            self.scan,
            module,
            replace(self.config, seed=seed),
            self.adapt_config,
            preprocess=self.preprocess,
            pretrained=self.pretrained,
            weights=None,
        )
        found.model.source = self.source
        found.model.backbone_trained = self.random  # its weights exist nowhere else
        return found


@dataclass
class _Work:
    """Train what is not finished of a plan."""

    models: _Models
    config: TrainConfig
    found: Scanned
    where: Circumstances
    resume: bool
    overwrite: bool

    def prepare(self, first: Prepared) -> None:
        """Compute the features that runs in other processes read from the cache."""
        if first.cached:
            writers = list[CacheWriter]()
            images = replace(first.preprocess, intensity_range=self.found.value_range)
            self._share(replace(first, preprocess=images), writers)
            for writer in writers:
                writer.join()
        first.model.cpu()
        if self.where.device.type == "cuda":
            torch.cuda.empty_cache()  # the memory is the other processes'

    def run(self, plan: Sequence[PlannedRun], parts: Sequence[Dataset], first: Prepared) -> None:
        """Train and write every run.

        Args:
            plan: the runs, seed by seed within a fold.
            parts: the data set with each fold's splits.
            first: a model for the first run.
        """
        progress, writers = self.where.progress, list[CacheWriter]()
        # Of cached features nothing inside the backbone trains in one stage.
        self.models.shares = first.cached and self.config.stages == 1
        if self.models.shares:
            self.models.pristine = first.model.backbone
        shared: SharedSources | None = None
        task = progress.add_task("runs", total=len(plan), unit="runs", note="")
        probes: dict[int | None, dict[str, Any]] = {}
        for number, run in enumerate(plan):
            folder = self.where.out / run.folder
            dataset = parts[0 if run.fold is None else run.fold - 1]
            resumed = self.resume and folder.is_dir()
            done = resumed and (folder / RESULTS).is_file() and (folder / CONFIG).is_file()
            check_folder(folder, resumed, self.overwrite)
            prepared = first if number == 0 else self.models.prepared(run.seed)
            prepared = replace(
                prepared,
                preprocess=replace(prepared.preprocess, intensity_range=self.found.value_range),
            )
            if shared is None and not done:
                shared = self._share(prepared, writers)
            began = time.perf_counter()
            with progress_bars(quiet=True) as silent:
                config = replace(self.config, seed=run.seed)
                result = run_prepared(
                    prepared,
                    dataset,
                    config,
                    replace(
                        self.where,
                        request=replace(self.where.request, config=config),
                        out=folder,
                        progress=silent,
                        resume=resumed,
                        pool=None,
                        phases=Phases(),
                        shared=shared,
                        probe=probes.get(run.fold),
                    ),
                )
            if "linear_probe" in result.results:
                probes[run.fold] = result.results["linear_probe"]
            progress.advance(task)
            self._tell(run, result, time.perf_counter() - began)
        progress.remove_task(task)
        for writer in writers:
            writer.join()
            if writer.problem is not None:
                progress.console.print(f"the features are not kept: {writer.problem}")

    def _share(self, prepared: Prepared, writers: list[CacheWriter]) -> SharedSources:
        """Compute what all runs share: features of every image, or the decoded images."""
        where, config = self.where, self.config
        images = ImageSource(
            self.found.dataset.samples,
            prepared.preprocess,
            where.device,
            where.workers,
            config.augmentation(),
            config.seed,
            pool=where.pool,
            timed=partial(where.phases, "decode"),
            decode_on=config.decode,
        )
        features = None
        if prepared.cached:
            dtype = precision(config.amp, where.device)
            prepared.model.to(where.device).to(memory_format=torch.channels_last)
            settings = CacheSettings(
                config.views, images.augment, config.seed, config.feature_dtype, str(dtype)
            )
            features = cached_source(
                prepared.model.eval(),
                images,
                where.out / CACHE,
                settings,
                where.progress,
                lambda: (
                    nullcontext() if dtype is None else torch.autocast(where.device.type, dtype)
                ),
                "all images",
                writers,
            )
        return SharedSources(images, features)

    def _tell(self, run: PlannedRun, result: TrainResult, seconds: float) -> None:
        if not result.trained:
            self.where.progress.console.print(f"{run.folder} is finished already")
            return
        split = "test" if "test" in result.results else "val"
        probe = result.results.get("linear_probe", {}).get(split)
        beside = "" if probe is None else f"; linear probe {probe['accuracy']:.2%}"
        line = f"{run.folder}: {split} {score_line(result.results[split])}{beside}"
        self.where.progress.console.print(f"{line}  {seconds:.1f} s")
