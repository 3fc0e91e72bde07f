"""Training in stages: the adapter on a frozen backbone, then, if asked for, everything."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from fastadapt.adapted_model import AdaptedModel, adapt
from fastadapt.checkpoint import backbone_fingerprint
from fastadapt.config import AdaptConfig
from fastadapt.data.augment import check_augment
from fastadapt.data.dataset import Dataset
from fastadapt.data.decode_on import check_decode, check_filter
from fastadapt.data.decode_pool import DecodePool, default_workers
from fastadapt.data.preprocess import Preprocess
from fastadapt.data.scan import Scan, Scanned
from fastadapt.data.splits import SPLITS as SPLIT_ORDER
from fastadapt.decision import check_decision
from fastadapt.errors import InputError, counted
from fastadapt.files import write_json
from fastadapt.gpu_start import begin_libraries
from fastadapt.host_memory import keep_freed_memory
from fastadapt.lora import lora_layers
from fastadapt.output_place import check_output
from fastadapt.processes import ALONE, Processes, place_from_environment
from fastadapt.progress import progress_bars
from fastadapt.train.config import DEFAULT_ADAPTER, TrainConfig
from fastadapt.train.devices import (
    check_batch_sizes,
    device_of_process,
    locked,
    parse_device,
    together,
)
from fastadapt.train.fold_settings import dataset_of
from fastadapt.train.kernels_ahead import begin_kernels
from fastadapt.train.loop import Trainer
from fastadapt.train.optimizer import make_optimizer
from fastadapt.train.outputs import frozen_probe, write_outputs
from fastadapt.train.phases import Phases, phase_table, process_age
from fastadapt.train.precision import precision
from fastadapt.train.request import REQUEST, Request
from fastadapt.train.results import TrainResult
from fastadapt.train.run_folder import (
    PROFILE,
    STATE,
    State,
    check_folder,
    check_settings,
    finished_results,
    load_state,
    remove_if_unused,
    remove_leftovers,
)
from fastadapt.train.shared_sources import SharedSources
from fastadapt.train.start import start_from
from fastadapt.trainable import last_blocks

__all__ = ["TrainConfig", "TrainResult", "train"]


def train(
    data: str | Path,
    out: str | Path,
    backbone: str | nn.Module | None,
    config: TrainConfig | None = None,
    adapt_config: AdaptConfig | None = None,
    *,
    preprocess: dict[str, Any] | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
    init: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    skip_unreadable: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    save_every: float = 30.0,
    profile: bool = False,
    scan: Scan | None = None,
) -> TrainResult:
    """Train an adapter for ``backbone`` on ``data`` and write a run folder.

    The folder holds ``config.json`` and ``adapter.safetensors`` (:func:`fastadapt.load_adapter`),
    ``labels.txt``, ``splits.csv``, ``metrics.jsonl``, ``results.json``, ``predictions.csv``,
    ``curves.png`` and ``cache/`` (safe to delete). While the run is unfinished it also holds
    ``state.safetensors``, from which ``resume`` continues; on a CPU the result is then bit for bit
    that of an uninterrupted run with the same number of threads.

    Images are decoded once, by processes of their own, and kept where they fit into half of the
    free memory; else they are decoded again in every epoch that needs them.

    Args:
        data: see :func:`fastadapt.data.dataset.read_dataset`.
        out: the run folder; must be new or empty, unless ``resume`` or ``overwrite``.
        backbone: as for :func:`fastadapt.adapt`; it must take images [B, 3, H, W]. ``None`` for
            that of ``init``.
        config: how to train.
        adapt_config: what to put behind the backbone; if ``None``, the default recipe's adapter,
            which is smaller than the paper's.
        preprocess: settings of :class:`fastadapt.data.preprocess.Preprocess` that differ from those
            that the backbone was trained with.
        pretrained, weights: as for :func:`fastadapt.adapt`.
        init: a run, or what :func:`fastadapt.save_adapter` wrote: training starts from its adapter,
            low-rank adapters and backbone, with its settings of model and images; from its head,
            too, if the classes are the same. ``adapt_config`` is left out.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        workers: processes that decode images; one per core if ``None``.
        skip_unreadable: leave damaged images out instead of refusing the data set.
        resume: continue an unfinished run with the same settings; a finished one is left as it is.
        overwrite: replace a run. Its files stay until the new run has its first ones.
        quiet: no progress bars, no lines.
        save_every: least seconds between two states on disk; 0 for one after every epoch. Ctrl-C
            and errors write the last epoch's state, a kill loses what came after the last one.
        profile: write ``profile.json``, the seconds of each phase, and print them.
        scan: of ``data``, begun before with the same settings; the caller
            closes its processes.

    Raises:
        InputError: anything given does not fit; the loss is no longer finite; the disk or the
            GPU's memory is full. Where a state was saved it stays, for ``resume``.
    """
    config = config or TrainConfig()
    if adapt_config is None and init is None:
        adapt_config = AdaptConfig(**DEFAULT_ADAPTER)
    out = check_output(out, "folder", "a run")
    check_folder(out, resume, overwrite)
    place = place_from_environment()
    target = parse_device(device if place.size == 1 else device_of_process(device, place))
    check_batch_sizes(config, place)
    amp = precision(config.amp, target)  # refused now rather than after the features were computed
    check_decode(config.decode, target)
    libraries = begin_libraries(target)
    workers = default_workers() if workers is None else workers
    phases = Phases(process_age() if profile else 0.0)
    request = Request(
        str(Path(data).absolute()),
        backbone if isinstance(backbone, str) else None,
        config,
        adapt_config,
        preprocess or {},
        pretrained,
        None if weights is None else str(Path(weights).absolute()),
        skip_unreadable,
        None if init is None else str(Path(init).absolute()),
    )
    begun = scan or Scan(dataset_of(data, config), workers, config.intensity_range, place)
    try:
        with (
            together(target) as processes,
            locked(processes, out),
            progress_bars(quiet or not processes.first) as progress,
        ):
            # Again, now that no other process writes.
            processes.on_first(lambda: check_folder(out, resume, overwrite))
            prepared = prepare(
                begun,
                backbone,
                config,
                adapt_config,
                preprocess=preprocess,
                pretrained=pretrained,
                weights=weights,
                init=init,
            )
            kernels = begin_kernels(prepared.model, config, target, amp, prepared.cached)
            with phases("decode"):
                found = scanned(
                    begun, progress, skip_unreadable=skip_unreadable, processes=processes
                )
            read = replace(prepared.preprocess, intensity_range=found.value_range)
            for thread in (libraries, kernels):
                if thread is not None:
                    thread.join()  # nothing launches beside a capture
            result = run_prepared(
                replace(prepared, preprocess=read),
                found.dataset,
                config,
                Circumstances(
                    request,
                    out,
                    target,
                    workers,
                    progress,
                    resume=resume,
                    save_every=save_every,
                    pool=begun.pool,
                    phases=phases,
                    processes=processes,
                ),
            )
            if profile and result.trained and processes.first:
                write_json(out / PROFILE, phases.to_dict())
                progress.console.print(phase_table(phases.to_dict()))
            return result
    finally:
        if begun.pool is not None and scan is None:
            begun.pool.close()


@dataclass(frozen=True)
class Circumstances:
    """Where and how a run is computed; the trained weights do not depend on it.

    Attributes:
        request: what was asked for, to go on from after an interruption.
        out: the run folder.
        device: where to compute.
        workers: processes that decode images.
        progress: bars and lines.
        resume: continue an unfinished run.
        save_every: least seconds between two states on disk.
        pool: processes that decode.
        phases: where seconds are counted.
        shared: features and images of several runs, of which this one takes its splits.
        probe: the linear probe beside the result, where another run fitted it already.
        processes: that train together.
    """

    request: Request
    out: Path
    device: torch.device
    workers: int
    progress: Progress
    resume: bool = False
    save_every: float = 30.0
    pool: DecodePool | None = None
    phases: Phases = field(default_factory=Phases)
    shared: SharedSources | None = None
    probe: dict[str, Any] | None = None
    processes: Processes = ALONE


def run_prepared(
    prepared: Prepared, dataset: Dataset, config: TrainConfig, where: Circumstances
) -> TrainResult:
    """Train a model that is made, on images that were scanned, and write its run folder.

    Args:
        prepared: the model; its weights change.
        dataset: with its splits.
        config: how to train.
        where: see :class:`Circumstances`.

    Returns:
        The result; that of the folder, where the run is finished already.

    Raises:
        InputError: as for :func:`train`.
    """
    if where.device.type == "cpu":
        keep_freed_memory()
    settings, out = prepared.settings(dataset, config), where.out
    state = _state_of(prepared, dataset, settings, config, where)
    if isinstance(state, TrainResult):
        return state
    trainer = Trainer(
        model=prepared.model,
        dataset=dataset,
        preprocess=prepared.preprocess,
        config=config,
        settings=settings,
        state=state,
        out=out,
        device=where.device,
        workers=where.workers,
        cached=prepared.cached,
        progress=where.progress,
        save_every=where.save_every,
        pool=where.pool,
        phases=where.phases,
        shared=where.shared,
        processes=where.processes,
    )
    where.processes.check_same("the images or the backbone's weights", settings)
    try:
        with full_disk_or_memory(out):
            where.processes.on_first(lambda: _begin(where))
            probe = where.probe or frozen_probe(trainer)
            try:
                trainer.run()
                return write_outputs(trainer, where.request.data, probe)
            except BaseException:
                trainer.save()
                raise
    finally:
        if where.processes.first:
            remove_if_unused(out)


def _begin(where: Circumstances) -> None:
    where.request.write(where.out)
    remove_leftovers(where.out)


@dataclass(frozen=True)
class Prepared:
    """A model and how it sees images, before the data set is known to be readable.

    Attributes:
        model: adapted, its backbone frozen.
        preprocess: from image files to its input.
        cached: whether stage 1 trains on cached features.
        init: hash of the weights that training starts from; None if they are new.
    """

    model: AdaptedModel
    preprocess: Preprocess
    cached: bool
    init: str | None = None

    def settings(self, dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
        """Return everything that a resumed run must have in common with this one."""
        settings = {
            "data": dataset.fingerprint(),
            "backbone": self.model.source["name"],
            "fingerprint": backbone_fingerprint(self.model),
            **self.model.config.to_dict(),
            **asdict(config),
            **self.preprocess.to_dict(),  # the intensity range as found, not as asked for
        }
        # The trained weights do not depend on these.
        for name in ("cuda_graph", "probe", "calibrate", "threshold", "abstain"):
            del settings[name]
        # Runs of older versions do not know these.
        if not config.refit:
            del settings["refit"]
        if config.decode == "cpu":
            del settings["decode"]
        return settings if self.init is None else {**settings, "init": self.init}


def prepare(
    scan: Scan,
    backbone: str | nn.Module | None,
    config: TrainConfig,
    adapt_config: AdaptConfig | None,
    *,
    preprocess: dict[str, Any] | None,
    pretrained: bool,
    weights: str | Path | None,
    init: str | Path | None = None,
) -> Prepared:
    """Make the model; refuse settings that do not fit it or each other.

    Args:
        scan: of the data set.
        backbone, config, adapt_config, preprocess, pretrained, weights, init: as for :func:`train`.

    Raises:
        InputError: settings do not fit.
    """
    torch.manual_seed(config.seed)
    weights = None if weights is None else str(Path(weights).absolute())
    classes = list(scan.dataset.classes)
    begun_from, given = None, {k: v for k, v in (preprocess or {}).items() if v is not None}
    if init is not None:
        if adapt_config is not None:
            raise InputError("`init` brings the adapter's settings: leave `adapt_config` out")
        begun = start_from(Path(init), backbone, classes, weights)
        model, begun_from = begun.model, begun.weights_sha256
        given = {**begun.preprocess, **given}
    elif backbone is None:
        raise InputError("give a `backbone`, or a run to start from with `init=...`")
    else:
        model = adapt(backbone, adapt_config, len(classes), pretrained=pretrained, weights=weights)
    if init is None and isinstance(backbone, str) and not pretrained and weights is None:
        # Random weights exist nowhere else: the checkpoint must hold them.
        model.backbone_trained = True
    images = Preprocess.from_pretrained_cfg(model.pretrained_cfg, **given)
    if tuple(images.input_size) != tuple(model.spec.input_size):
        raise InputError(
            f"preprocess gives images of {images.input_size}, the model was adapted for "
            f"{model.spec.input_size}: set AdaptConfig(input_size=...) instead"
        )
    if images.intensity_range is not None:
        raise InputError("set the intensity range in TrainConfig(intensity_range=...)")
    check_augment(config.augmentation(), images)
    if config.decode == "gpu":
        check_filter(images.geometry)
    check_decision(config.threshold, len(scan.dataset.classes))
    cached = config.cache and not config.full and not lora_layers(model.backbone)
    if config.layer_decay < 1:
        make_optimizer(model, config)  # refused now rather than in stage 2
    if config.unfreeze_last is not None:
        last_blocks(model.backbone, config.unfreeze_last, "unfreeze_last")
    if not cached and config.views > 1:
        raise InputError(
            f"views is {config.views}, but nothing is cached (`cache=False`, LoRA or `full`), so "
            "that every epoch has fresh views anyway: leave `views` out"
        )
    if cached and config.stages == 1 and config.augments and config.views == 1:
        raise InputError(
            f"augment is {config.augment!r}, but with one cached view, the plain one, it has no "
            "effect in stage 1: give `views` of 2 or more, or `cache=False` for fresh views"
        )
    if cached and config.stages == 1 and config.cutmix:
        raise InputError(
            f"cutmix is {config.cutmix}, but it cuts images, and stage 1 trains on cached "
            "features: give `cache=False`, or `mixup=0.2`, which mixes features"
        )
    return Prepared(model, images, cached, begun_from)


def _state_of(
    prepared: Prepared,
    dataset: Dataset,
    settings: dict[str, Any],
    config: TrainConfig,
    where: Circumstances,
) -> State | TrainResult:
    """Return where training begins, or the result of a run that is finished; say what is there."""
    say, model, out = where.progress.console.print, prepared.model, where.out
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = ", ".join(f"{len(dataset.split(split))} {split}" for split in SPLIT_ORDER)
    say(f"{counted(len(dataset.classes), 'class', 'classes')}, images: {counts}")
    say(f"{model.source['name']} on {where.device}: {trainable:,} parameters train in stage 1")
    state = State()
    if where.resume and (out / STATE).is_file():
        state, then = load_state(out / STATE)
        check_settings(settings, then, out)
        refit = " of the refit" if state.refit else ""
        say(f"resuming after epoch {state.epoch} of stage {state.stage}{refit}")
    elif where.resume:
        results = finished_results(out, settings)
        if results is not None:
            (out / REQUEST).unlink(missing_ok=True)  # a kill may have left it
            say(f"{out} is finished already: nothing to resume")
            return TrainResult(out, results["best"], results, trained=False)
        say("no epoch was completed: starting from the beginning")
    if not prepared.cached:
        reason = "low-rank adapters change them" if config.cache else "the cache is off"
        reason = "the backbone trains" if config.full else reason
        say(f"features are not cached ({reason}): every epoch runs the backbone")
    return state


def scanned(
    scan: Scan,
    progress: Progress,
    *,
    skip_unreadable: bool = False,
    processes: Processes = ALONE,
) -> Scanned:
    """Wait for a scan, with a progress bar, and print what was found.

    Raises:
        InputError: as :meth:`fastadapt.data.scan.Scan.wait`.
    """
    total = len(scan.dataset.samples)
    task = progress.add_task("reading images", total=total, unit="images", note="")
    found = scan.wait(
        skip_unreadable=skip_unreadable,
        advance=lambda count: progress.advance(task, count),
        processes=processes,
    )
    progress.remove_task(task)
    for line in (*scan.dataset.summary(), *found.lines):
        progress.console.print(line, markup=False)
    return found


@contextmanager
def full_disk_or_memory(out: Path) -> Iterator[None]:
    """Says in one line what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        again = " with `resume=True`" if (out / STATE).is_file() else ""
        raise InputError(
            f"the disk of {out} is full: free some space, then run the same again{again}"
        ) from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            "the GPU's memory is full: start anew with a smaller `batch_size` (`batch_size2` for "
            "stage 2)"
        ) from error
