"""Run few-shot training of GDPL: a few images of the base classes, then all evaluations."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastadapt.checkpoint import CONFIG
from fastadapt.data.augment import check_augment
from fastadapt.data.dataset import Dataset, read_dataset
from fastadapt.data.decode_pool import default_workers
from fastadapt.data.preprocess import Preprocess
from fastadapt.data.scan import Scan
from fastadapt.errors import InputError
from fastadapt.files import read_json, write_json, write_text
from fastadapt.gdpl.checkpoint import GDPLSource, fingerprints, save_gdpl
from fastadapt.gdpl.config import GDPLConfig, GDPLTrainConfig
from fastadapt.gdpl.domain_features import FeatureTable
from fastadapt.gdpl.evaluate import Evaluator, Task
from fastadapt.gdpl.few_shot import (
    draw_splits,
    evaluation_samples,
    of_classes,
    read_names,
    sample_shots,
    split_classes,
)
from fastadapt.gdpl.loop import train_epochs
from fastadapt.gdpl.model import GDPLModel
from fastadapt.gpu_start import begin_libraries
from fastadapt.host_memory import keep_freed_memory
from fastadapt.info import versions
from fastadapt.locks import lock_folder
from fastadapt.output_place import check_output
from fastadapt.progress import progress_bars
from fastadapt.train.devices import parse_device
from fastadapt.train.outputs import RECORDED
from fastadapt.train.phases import Phases, phase_table, process_age
from fastadapt.train.precision import precision
from fastadapt.train.run import full_disk_or_memory, scanned
from fastadapt.train.run_folder import (
    LABELS,
    PROFILE,
    RESULTS,
    SPLITS,
    STATE,
    State,
    check_folder,
    check_settings,
    finished_results,
    load_state,
    remove_if_empty,
    remove_leftovers,
    save_state,
    write_metrics,
)


def train_gdpl(
    data: str | Path,
    out: str | Path,
    source: GDPLSource,
    config: GDPLTrainConfig | None = None,
    gdpl_config: GDPLConfig | None = None,
    *,
    seeds: Sequence[int] = (1,),
    deviation: str = "sample",
    eval_data: Sequence[str | Path] = (),
    names_file: str | Path | None = None,
    domain_features: FeatureTable | None = None,
    device: str = "auto",
    workers: int | None = None,
    skip_unreadable: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    profile: bool = False,
) -> dict[str, Any]:
    """Train GDPL once per seed and evaluate it.

    A seed decides the drawn images, the initial prompts and the order of training; the split into
    training and evaluation is the same for all. With one seed ``out`` is the run folder, with more
    each has its own in it, ``seed1`` and so on: ``config.json``, ``adapter.safetensors``
    (:func:`fastadapt.gdpl.load_gdpl`), ``labels.txt``, ``splits.csv``, ``metrics.jsonl``,
    ``results.json``; while it is unfinished also ``state.safetensors``, written after every epoch.
    ``out/results.json`` holds the results of all.

    Args:
        data: see :func:`fastadapt.data.dataset.read_dataset`.
        out: new or empty, unless ``resume`` or ``overwrite``.
        source: the CLIP model and the domain encoder.
        config: how to train.
        gdpl_config: what to train.
        seeds: one run each.
        deviation: which standard deviation tables show after the mean of the seeds, ``"sample"``
            or ``"population"``.
        eval_data: other data sets, each measured as a whole (its test split, if it has one).
        names_file: see :func:`fastadapt.gdpl.few_shot.read_names`; for all data sets.
        domain_features: of the plain images of all data sets, for a source that names a width
            and no encoder. Random views then have the features of the plain image.
        device, workers, skip_unreadable, quiet: as for :func:`fastadapt.train.train`.
        resume: continue after the last epoch that was completed; seeds that are finished stay as
            they are. On a CPU the result is bit for bit that of an uninterrupted run with the same
            number of threads.
        overwrite: replace runs. Their files stay until the new run has completed an epoch.
        profile: write ``profile.json`` to ``out``, the seconds of each phase, and print them.

    Returns:
        ``{"seeds": {seed: {"metrics": {task: metrics}, …}}, "zero_shot": {task: metrics}, …}``.

    Raises:
        InputError: anything given does not fit; the loss is no longer finite.
    """
    config, gdpl_config = config or GDPLTrainConfig(), gdpl_config or GDPLConfig()
    out = check_output(out, "folder", "a run")
    seeds, table = tuple(seeds), domain_features
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds are {seeds}; expected different numbers, 0 or more")
    folders = {seed: out if len(seeds) == 1 else out / f"seed{seed}" for seed in seeds}
    _check_folders(out, folders.values(), resume, overwrite)
    _check_source(source, table)
    target = parse_device(device)
    amp = precision(config.amp, target)
    libraries = begin_libraries(target)
    if target.type == "cpu":
        keep_freed_memory()
    phases = Phases(process_age() if profile else 0.0)
    autocast = nullcontext if amp is None else lambda: torch.autocast(target.type, dtype=amp)
    workers = default_workers() if workers is None else workers

    with lock_folder(out), progress_bars(quiet) as progress:
        _check_folders(out, folders.values(), resume, overwrite)  # of now that no other writes
        say = progress.console.print
        asked = config.intensity_range
        read, value_range = [], None
        for path in (data, *eval_data):
            splits = read_dataset(path, config.val_fraction)
            splits = draw_splits(splits, config.val_fraction, config.test_fraction)
            with Scan(splits, workers, asked) as begun, phases("decode"):
                scan = scanned(begun, progress, skip_unreadable=skip_unreadable)
            read.append(scan.dataset)
            if len(read) == 1 and scan.value_range is not None:
                value_range = scan.value_range
                asked = "{!r}:{!r}".format(*value_range)  # other data are scaled as DATA
        dataset = read[0]
        names = read_names(names_file, read)
        train_range, tasks = _tasks(dataset, names, config)
        tasks += _other_tasks(eval_data, read[1:], names, {task.name for task in tasks})
        train_samples = of_classes(dataset.split("train"), train_range)
        if table is not None:  # an image without features is refused before any training
            table.of([s.path for s in (*train_samples, *(s for t in tasks for s in t.samples))])

        if libraries is not None:
            libraries.join()  # nothing launches beside a capture
        runs: dict[str, Any] = {}
        zero_shot, evaluator = None, None
        for seed in seeds:
            torch.manual_seed(seed)
            model = source.create(tasks[0].classes, gdpl_config)
            for task in tasks:  # invalid names are refused before any training
                model.set_class_names(task.classes)
            model.set_class_names(tasks[0].classes).to(target).offload_token_embedding()
            model.set_grad_checkpointing(config.grad_checkpointing)
            settings = {
                "data": dataset.fingerprint(),
                "fingerprint": fingerprints(model),
                "domain_features": None if table is None else table.fingerprint(),
                **asdict(source),
                **asdict(gdpl_config),
                **asdict(config),
                "classes": {task.name: task.classes for task in tasks},
                "intensity_range": value_range,
            }
            for name in ("cuda_graph", "grad_checkpointing"):
                del settings[name]  # the result does not depend on it
            folder, state, found = folders[seed], State(), None
            if resume and (folder / STATE).is_file():
                state, then = load_state(folder / STATE)
                check_settings(settings, then, folder)
                say(f"seed {seed}: resuming after epoch {state.epoch}")
            elif resume:
                found = finished_results(folder, settings)
            if found is not None:
                runs[str(seed)], zero_shot = found, found["zero_shot"]
                say(f"seed {seed} is finished already")
                continue
            if evaluator is None:
                images = Preprocess.from_pretrained_cfg(
                    model.pretrained_cfg, intensity_range=value_range
                )
                check_augment(config.augmentation(), images)
                graph = config.cuda_graph == "auto"
                evaluator = Evaluator(
                    images, target, workers, autocast, progress, table, graph=graph
                )
            shots = sample_shots(train_samples, config.shots, seed)
            if amp is not None:
                model.set_frozen_dtype(amp)

            def save(state: State, folder=folder, settings=settings) -> None:
                with phases("saving"):
                    save_state(state, settings, folder / STATE)
                    write_metrics(folder, state.history)
                if overwrite and folder == folders[seeds[0]] and state.epoch == 1:
                    _discard_results(out, folders.values(), folder)

            existed = folder.is_dir()
            try:
                with full_disk_or_memory(folder):
                    remove_leftovers(folder)
                    if state.history:  # it may have been killed between the state and these
                        write_metrics(folder, state.history)
                    with phases("stage1"):
                        train_epochs(model, shots, config, evaluator, seed, state, save)
                    with phases("validation"):
                        if zero_shot is None and model.classes.context is not None:
                            zero_shot = {
                                task.name: evaluator.measure(model, task, zero_shot=True)
                                for task in tasks
                            }
                        metrics = {task.name: evaluator.measure(model, task) for task in tasks}
                    model.set_class_names(tasks[0].classes)
                    runs[str(seed)] = {
                        "seed": seed,
                        "train_images": len(shots),
                        "first_loss": state.history[0]["train_loss"],
                        "last_loss": state.history[-1]["train_loss"],
                        "metrics": metrics,
                        "zero_shot": zero_shot,
                        "settings": settings,
                    }
                    _write_run(folder, model, source, runs[str(seed)], dataset, evaluator)
            finally:
                if not existed:
                    remove_if_empty(folder)
        first = runs[str(seeds[0])]
        results = {
            "classes": {task.name: list(task.classes) for task in tasks},
            "images": {task.name: len(task.samples) for task in tasks},
            "zero_shot": first["zero_shot"],
            "deviation": deviation,
            "settings": first["settings"],
            "versions": {k: v for k, v in versions().items() if k in RECORDED},
            "seeds": runs,
        }
        if len(seeds) > 1:
            write_json(out / RESULTS, results)
        if profile:
            write_json(out / PROFILE, phases.to_dict())
            say(phase_table(phases.to_dict()))
    return results


def _check_folders(out: Path, folders: Collection[Path], resume: bool, overwrite: bool) -> None:
    """Refuse folders that must not be written to, before any work.

    Raises:
        InputError: as :func:`fastadapt.train.run_folder.check_folder`; ``out`` holds a run of one
            seed, and several are asked for.
    """
    if resume and overwrite:
        raise InputError("`resume` and `overwrite` exclude each other: give one of them")
    if resume and not out.is_dir():
        raise InputError(f"{out} does not exist, so there is no run to resume")
    if len(folders) > 1 and ((out / CONFIG).is_file() or (out / STATE).is_file()):
        raise InputError(
            f"{out} holds the run of one seed; several have a folder each: give another `out`"
        )
    for folder in folders:
        check_folder(folder, False, overwrite or resume)
    if len(folders) > 1 and (out / RESULTS).exists():
        if not _is_of_seeds(out / RESULTS):
            raise InputError(f"{out / RESULTS} is no run's: give a new or empty folder as `out`")
        if not (overwrite or resume):
            raise InputError(f"{out} holds the results of other seeds: give another `out`")


def _is_of_seeds(path: Path) -> bool:
    """Say whether a file holds results of several seeds, by its keys."""
    try:
        return {"seeds", "zero_shot", "settings"} <= read_json(path).keys()
    except InputError:
        return False


def _check_source(source: GDPLSource, table: FeatureTable | None) -> None:
    """Check that features come either from an encoder or from a table of features.

    Raises:
        InputError: both are given, or none, or the widths differ.
    """
    encoder = source.domain_encoder
    if isinstance(encoder, str) and table is not None:
        raise InputError("give a domain encoder or domain features, not both")
    if isinstance(encoder, int) and (table is None or table.width != encoder):
        got = "none are given" if table is None else f"{table.file} has {table.width}"
        raise InputError(f"the source wants domain features of width {encoder}, but {got}")


def _discard_results(out: Path, folders: Iterable[Path], now: Path) -> None:
    """Delete earlier runs' results and states once the run that replaces them has a state."""
    for folder in {out, *folders}:
        (folder / RESULTS).unlink(missing_ok=True)
        if folder != now:
            (folder / STATE).unlink(missing_ok=True)


def _class_names(dataset: Dataset, names: dict[str, str]) -> tuple[str, ...]:
    return tuple(names.get(folder, folder) for folder in dataset.classes)


def _tasks(
    dataset: Dataset, names: dict[str, str], config: GDPLTrainConfig
) -> tuple[range, list[Task]]:
    """Return the classes that train, and the tasks of the data set, those classes first."""
    samples, called = evaluation_samples(dataset), _class_names(dataset, names)
    parts = {"all": range(len(called))}
    if config.train_classes == "base":
        parts = dict(zip(("base", "novel"), split_classes(len(called)), strict=True))
    tasks = []
    for name, classes in parts.items():
        chosen = of_classes(samples, classes)
        if not chosen:
            raise InputError(f"no evaluation image belongs to the {name} classes")
        tasks.append(Task(name, tuple(chosen), tuple(called[i] for i in classes)))
    return next(iter(parts.values())), tasks


def _other_tasks(
    paths: Sequence[str | Path],
    datasets: Sequence[Dataset],
    names: dict[str, str],
    taken: set[str],
) -> list[Task]:
    """Return one task per data set that was not trained on."""
    tasks = []
    for path, dataset in zip(paths, datasets, strict=True):
        name = Path(path).absolute().stem
        if name in taken:
            raise InputError(f"two evaluations would be called {name!r}: rename the folder {path}")
        taken = taken | {name}
        samples = dataset.split("test") or list(dataset.samples)
        tasks.append(Task(name, tuple(samples), _class_names(dataset, names)))
    return tasks


def _write_run(
    folder: Path,
    model: GDPLModel,
    source: GDPLSource,
    result: dict[str, Any],
    dataset: Dataset,
    evaluator: Evaluator,
) -> None:
    """Write the run folder of one seed; results.json marks it as finished, then its state goes."""
    save_gdpl(
        model,
        folder,
        source,
        frozen=result["settings"]["fingerprint"],
        labels=list(model.class_names),
        preprocess=evaluator.preprocess.to_dict(),
        train={"settings": result["settings"]},
    )
    write_text(folder / LABELS, "".join(f"{name}\n" for name in model.class_names))
    dataset.write_splits(folder / SPLITS)
    write_json(folder / RESULTS, result)
    (folder / STATE).unlink(missing_ok=True)
