"""Few-shot training of GDPL: some images of the base classes, then every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastadapt.augment import check_augment
from fastadapt.data import Dataset, read_dataset
from fastadapt.errors import InputError
from fastadapt.files import read_json, write_json, write_text
from fastadapt.gdpl.checkpoint import GDPLSource, fingerprints, save_gdpl
from fastadapt.gdpl.evaluate import Evaluator, Task
from fastadapt.gdpl.fewshot import (
    evaluation_samples,
    of_classes,
    read_names,
    sample_shots,
    split_classes,
)
from fastadapt.gdpl.loop import GDPLTrainConfig, train_epochs
from fastadapt.gdpl.model import GDPLConfig, GDPLModel
from fastadapt.info import versions
from fastadapt.preprocess import Preprocess
from fastadapt.progress import default_workers, progress_bars
from fastadapt.runfolder import LABELS, RESULTS, SPLITS, check_folder, check_settings, write_metrics
from fastadapt.train import RECORDED, full_disk_or_memory, parse_device, readable
from fastadapt.trainer import precision


def train_gdpl(
    data: str | Path,
    out: str | Path,
    source: GDPLSource,
    config: GDPLTrainConfig | None = None,
    gdpl_config: GDPLConfig | None = None,
    *,
    seeds: Sequence[int] = (1,),
    eval_data: Sequence[str | Path] = (),
    names_file: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    skip_unreadable: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> dict[str, Any]:
    """Trains GDPL once per seed and evaluates it.

    A seed decides the drawn images, the initial prompts and the order of training; the split into
    training and evaluation is the same for all. With one seed ``out`` is the run folder, with more
    each has its own in it, ``seed1`` and so on: ``config.json``, ``adapter.safetensors``
    (:func:`fastadapt.gdpl.load_gdpl`), ``labels.txt``, ``splits.csv``, ``metrics.jsonl``,
    ``results.json``. ``out/results.json`` holds the results of all.

    Args:
        data: see :func:`fastadapt.data.read_dataset`.
        out: new or empty, unless ``resume`` or ``overwrite``.
        source: the CLIP model and the domain encoder.
        config: how to train.
        gdpl_config: what to train.
        seeds: one run each.
        eval_data: other data sets, each measured as a whole (its test split, if it has one).
        names_file: see :func:`fastadapt.gdpl.fewshot.read_names`; for all data sets.
        device, workers, skip_unreadable, quiet: as for :func:`fastadapt.train.train`.
        resume: leave the seeds that are finished as they are.
        overwrite: replace runs.

    Returns:
        ``{"seeds": {seed: {"metrics": {task: metrics}, …}}, "zero_shot": {task: metrics}, …}``.

    Raises:
        InputError: anything given does not fit; the loss is no longer finite.
    """
    config, gdpl_config = config or GDPLTrainConfig(), gdpl_config or GDPLConfig()
    out, seeds = Path(out), tuple(seeds)
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other: give one of them")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds are {seeds}; expected different numbers, 0 or more")
    folders = {seed: out if len(seeds) == 1 else out / f"seed{seed}" for seed in seeds}
    finished = {seed for seed in seeds if resume and (folders[seed] / RESULTS).is_file()}
    for seed in seeds:
        if seed not in finished:
            check_folder(folders[seed], False, overwrite or resume)
    target = parse_device(device)
    amp = precision(config.amp, target)
    autocast = nullcontext if amp is None else lambda: torch.autocast(target.type, dtype=amp)
    workers = default_workers() if workers is None else workers

    with progress_bars(quiet) as progress:
        say = progress.console.print
        read = [
            readable(read_dataset(path, config.val_fraction), workers, skip_unreadable, progress)
            for path in (data, *eval_data)
        ]
        dataset = read[0]
        names = read_names(names_file, read)
        train_range, tasks = _tasks(dataset, names, config)
        tasks += _other_tasks(eval_data, read[1:], names, {task.name for task in tasks})
        train_samples = of_classes(dataset.split("train"), train_range)

        runs: dict[str, Any] = {}
        zero_shot, evaluator = None, None
        for seed in seeds:
            torch.manual_seed(seed)
            model = source.create(tasks[0].classes, gdpl_config)
            for task in tasks:  # names that do not fit are refused before any training
                model.set_class_names(task.classes)
            model.set_class_names(tasks[0].classes).to(target)
            settings = {
                "data": dataset.fingerprint(),
                "fingerprint": fingerprints(model),
                **asdict(source),
                **asdict(gdpl_config),
                **asdict(config),
                "classes": {task.name: task.classes for task in tasks},
            }
            if seed in finished:
                found = read_json(folders[seed] / RESULTS)
                check_settings(settings, found["settings"], folders[seed])
                runs[str(seed)], zero_shot = found, found["zero_shot"]
                say(f"seed {seed} is finished already")
                continue
            if evaluator is None:
                images = Preprocess.from_pretrained_cfg(model.pretrained_cfg)
                check_augment(config.augment, images)
                evaluator = Evaluator(images, target, workers, autocast, progress)
            shots = sample_shots(train_samples, config.shots, seed)
            with full_disk_or_memory(folders[seed]):
                if zero_shot is None and model.classes.context is not None:
                    zero_shot = {t.name: evaluator.measure(model, t, zero_shot=True) for t in tasks}
                    model.set_class_names(tasks[0].classes)
                history = train_epochs(model, shots, config, evaluator, seed)
                metrics = {task.name: evaluator.measure(model, task) for task in tasks}
            runs[str(seed)] = {
                "seed": seed,
                "train_images": len(shots),
                "first_loss": history[0]["train_loss"],
                "last_loss": history[-1]["train_loss"],
                "metrics": metrics,
                "zero_shot": zero_shot,
                "settings": settings,
            }
            model.set_class_names(tasks[0].classes)
            _write_run(folders[seed], model, source, runs[str(seed)], history, dataset, evaluator)
        first = runs[str(seeds[0])]
        results = {
            "classes": {task.name: list(task.classes) for task in tasks},
            "images": {task.name: len(task.samples) for task in tasks},
            "zero_shot": first["zero_shot"],
            "settings": first["settings"],
            "versions": {k: v for k, v in versions().items() if k in RECORDED},
            "seeds": runs,
        }
        if len(seeds) > 1:
            write_json(out / RESULTS, results)
    return results


def _class_names(dataset: Dataset, names: dict[str, str]) -> tuple[str, ...]:
    return tuple(names.get(folder, folder) for folder in dataset.classes)


def _tasks(
    dataset: Dataset, names: dict[str, str], config: GDPLTrainConfig
) -> tuple[range, list[Task]]:
    """The classes that train, and what is measured on the data set, those classes first."""
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
    """One task per data set that was not trained on."""
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
    history: list[dict[str, float]],
    dataset: Dataset,
    evaluator: Evaluator,
) -> None:
    """The run folder of one seed; results last, since they mark it as finished."""
    save_gdpl(
        model,
        folder,
        source,
        labels=list(model.class_names),
        preprocess=evaluator.preprocess.to_dict(),
        train={"settings": result["settings"]},
    )
    write_text(folder / LABELS, "".join(f"{name}\n" for name in model.class_names))
    dataset.write_splits(folder / SPLITS)
    write_metrics(folder, history)
    write_json(folder / RESULTS, result)
