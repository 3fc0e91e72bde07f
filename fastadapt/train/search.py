"""Search for the best adapter and training of a data set, on features that are computed once.

(1) the features of the training and validation images, by backbone, into ``OUT/cache``
(2) trials: draw settings, train on K-1 folds, score the other; end what is clearly worse
(3) the best few again on folds that are drawn anew; the best mean of both is chosen
(4) one run of :func:`fastadapt.train.run.train` with it, judged once on the test split

No test image is seen before (4).
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from fastadapt.checkpoint import backbone_fingerprint
from fastadapt.config import AdaptConfig
from fastadapt.data.dataset import read_dataset
from fastadapt.data.decode_on import check_decode
from fastadapt.data.decode_pool import default_workers
from fastadapt.data.folds import assign_folds
from fastadapt.data.scan import Scan
from fastadapt.device_list import check_one_way, expand_devices
from fastadapt.errors import InputError, counted
from fastadapt.files import is_temporary, read_json, write_json
from fastadapt.locks import LOCK, lock_folder
from fastadapt.output_place import check_output
from fastadapt.progress import progress_bars
from fastadapt.train.config import DEFAULT_ADAPTER, TrainConfig
from fastadapt.train.devices import parse_device
from fastadapt.train.linear_probe import probe_by_folds
from fastadapt.train.results import TrainResult
from fastadapt.train.run import scanned, train
from fastadapt.train.run_folder import CACHE
from fastadapt.train.search_config import NamedBackbone, SearchConfig
from fastadapt.train.search_processes import run_trials
from fastadapt.train.search_report import (
    counts,
    draw_search,
    importances,
    trials_table,
    write_trials,
)
from fastadapt.train.search_space import Space
from fastadapt.train.search_trials import (
    JOURNAL,
    Task,
    begin,
    fold_score,
    import_optuna,
    open_study,
    trial_of,
)
from fastadapt.train.trial_features import frozen_backbone, trial_features
from fastadapt.train.trials import Features

SETTINGS, FOUND = "settings.json", "search.json"
FORMAT = "fastadapt-search"
TRIALS, PICTURE = "trials.csv", "search.png"
RUN = "run"
OURS = {SETTINGS, FOUND, TRIALS, PICTURE, JOURNAL, CACHE, RUN}


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        out: its folder.
        found: ``search.json``: the chosen settings with their scores, the counts of trials, what
            mattered, and seconds.
        run: the run that was trained with them; its folder is ``out / "run"``.
    """

    out: Path
    found: dict[str, Any]
    run: TrainResult


def search(
    data: str | Path,
    out: str | Path,
    backbones: str | list[NamedBackbone],
    search_config: SearchConfig | None = None,
    config: TrainConfig | None = None,
    adapt_config: AdaptConfig | None = None,
    *,
    held: Collection[str] = (),
    image_size: int | None = None,
    preprocess: dict[str, Any] | None = None,
    pretrained: bool = True,
    device: str = "auto",
    workers: int | None = None,
    skip_unreadable: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> SearchResult:
    """Search for the settings that suit a data set, and train with the best.

    The folder holds ``run/`` (:func:`fastadapt.train.run.train`'s), ``search.json``,
    ``trials.csv``, ``search.png``, ``journal.log`` (optuna's) and ``settings.json``.

    Args:
        data: see :func:`fastadapt.data.dataset.read_dataset`. Training and validation images are
            dealt into folds together; the test images judge the last run alone.
        out: the folder; new or empty, unless ``resume`` or ``overwrite``.
        backbones: timm's name of one, or those to choose from.
        search_config: how to search.
        config, adapt_config: the settings to begin with; what is not varied stays.
        held: names of settings that are not varied.
        image_size: height and width in pixels; the backbone's own if ``None``.
        preprocess, pretrained, workers, skip_unreadable: as for ``train``.
        device: of features, of trials and of the run, unless ``search_config`` names devices.
        resume: go on with the trials that ``out`` holds.
        overwrite: replace a search.
        quiet: no progress bars, no lines.

    Raises:
        InputError: anything given does not fit; optuna is not installed; no trial ran to its end.
    """
    import_optuna()
    how, config = search_config or SearchConfig(), config or TrainConfig()
    adapt_config = adapt_config or AdaptConfig(**DEFAULT_ADAPTER)
    out = check_output(out, "folder", "a search")
    if isinstance(backbones, str):
        backbones = [NamedBackbone(backbones, None)]
    if adapt_config.lora is not None:
        raise InputError("search trains on cached features, which LoRA would change: leave it out")
    _check_folder(out, resume, overwrite)
    check_one_way(device, how.devices)
    names_of_devices = expand_devices(how.devices) if how.devices else (device,)
    devices = [parse_device(name) for name in names_of_devices]
    target, device = devices[0], names_of_devices[0]
    check_decode(config.decode, target)
    started = time.perf_counter()
    names = [item.name for item in backbones]
    small = all(place.type == "cpu" for place in devices)
    space = Space.around(config, adapt_config, held, names, small=small)
    workers = default_workers() if workers is None else workers
    with lock_folder(out), progress_bars(quiet) as progress:
        _check_folder(out, resume, overwrite)  # again, now that no other process writes
        for name in (TRIALS, PICTURE, JOURNAL, FOUND, SETTINGS) if overwrite else ():
            (out / name).unlink(missing_ok=True)
        say = progress.console.print
        with Scan(
            read_dataset(data, config.val_fraction, config.seed), workers, config.intensity_range
        ) as scan:
            found = scanned(scan, progress, skip_unreadable=skip_unreadable)
            dataset = found.dataset
            given = [s.label for name in ("train", "val") for s in dataset.split(name)]
            assign_folds(dataset.classes, given, how.folds)  # what has too few is refused here
            torch.manual_seed(config.seed)  # of random weights, as the run draws them
            known = [
                frozen_backbone(
                    item.name,
                    image_size,
                    pretrained=pretrained,
                    weights=item.weights,
                    preprocess=preprocess,
                    features=adapt_config.features,
                )
                for item in backbones
            ]
            settings = {
                "data": dataset.fingerprint(),
                "backbones": {item.name: backbone_fingerprint(item.model) for item in known},
                "folds": how.folds,
                "positions": how.positions,
                "varied": {name: list(choice) for name, choice in space.varied.items()},
                "training": asdict(config),
                "adapter": adapt_config.to_dict(),
                "images": {"size": image_size, **(preprocess or {})},
            }
            _check_settings(out, settings, resume)
            features = {}
            for item in known:
                parts = {name: dataset.split(name) for name in ("train", "val")}
                features[item.name] = trial_features(
                    item,
                    parts,
                    dataset.classes,
                    config,
                    target,
                    out / CACHE,
                    progress,
                    pool=scan.pool,
                    workers=workers,
                    value_range=found.value_range,
                    positions=how.positions,
                )
                item.model.cpu()
        decoded = time.perf_counter() - started
        task = _task(out, space, how, features, devices, config.seed)
        _run(task, devices, progress)
        trials = open_study(task).get_trials(deepcopy=False)
        whole = [trial for trial in trials if trial.state.name == "COMPLETE"]
        if not whole:
            raise InputError(
                f"no trial of {len(trials)} ran to its end; {out / JOURNAL} has their reasons"
            )
        searched = time.perf_counter() - started - decoded
        labels = next(iter(features.values())).labels
        probes = {
            name: probe_by_folds(_means(item), labels, task.folds, config.select, dataset.classes)
            for name, item in features.items()
        }
        probe, metric = max(probes.values()), config.select.replace("_", "-")
        say(trials_table(trials, probe, metric))
        chosen, confirmed = _confirmed(task, whole, devices[0])
        number = counts(trials)
        say(
            ", ".join(f"{counted(count, 'trial')} {what}" for what, count in number.items()),
            markup=False,
        )
        shares = importances(trials)
        write_trials(out / TRIALS, trials)
        draw_search(out / PICTURE, trials, shares, probe, metric)
        best_config, best_adapter = space.settings(chosen.params)
        name = chosen.params.get("backbone", backbones[0].name)
        result: dict[str, Any] = {
            "chosen": {
                "trial": chosen.number,
                "backbone": name,
                "settings": chosen.params,
                config.select: chosen.value,
                "folds": chosen.user_attrs["scores"],
                "other_folds": confirmed,
            },
            "first_trial": next((t.user_attrs["scores"] for t in whole if t.number == 0), None),
            "linear_probe": probes,
            "trials": number,
            "importances": shares,
            "seconds": {"features": decoded, "trials": searched},
            "device": [str(item) for item in devices],
        }
        write_json(out / FOUND, result)
    best = next(item for item in known if item.name == name)
    _share_cache(out)
    size = None if image_size is None else (3, image_size, image_size)
    run = train(
        data,
        out / RUN,
        name,
        best_config,
        replace(best_adapter, input_size=size),
        preprocess=preprocess,
        pretrained=pretrained,
        weights=best.weights,
        device=device,
        workers=workers,
        skip_unreadable=skip_unreadable,
        overwrite=True,
        quiet=quiet,
    )
    result["seconds"]["run"] = time.perf_counter() - started - decoded - searched
    result["test"] = run.results.get("test")
    write_json(out / FOUND, result)
    return SearchResult(out, result, run)


def _check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that a search must not write to."""
    if resume and overwrite:
        raise InputError("`resume` and `overwrite` exclude each other: give one of them")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; expected a folder")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    there = {name for name in there - {LOCK} if not is_temporary(name, OURS)}
    known = _is_search(out)
    ours = (
        {name for name in there if name in OURS or name.startswith(JOURNAL)} if known else {CACHE}
    )
    foreign = sorted(there - ours)
    if foreign:
        raise InputError(
            f"{out} holds other files, {foreign[0]!r} for one: give a new or empty folder as `out`"
        )
    if there and not (resume or overwrite):
        raise InputError(
            f"{out} holds a search: go on with it by `resume=True`, or replace it with "
            "`overwrite=True`"
        )


def _is_search(out: Path) -> bool:
    """Say whether a folder is a search's: its settings state the format."""
    try:
        return read_json(out / SETTINGS).get("format") == FORMAT
    except InputError:
        return False


def _check_settings(out: Path, settings: dict[str, Any], resume: bool) -> None:
    """Note the settings, or compare them with those of the search that is resumed."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if resume and path.is_file():
        then = read_json(path)
        now = {key: _plain(value) for key, value in settings.items()}
        changed = [key for key in now if then.get(key) != now[key]]
        if changed:
            raise InputError(
                f"{out} was searched with other {', '.join(changed)}: give the same settings to "
                "resume, or `overwrite=True`"
            )
        return
    write_json(path, {"format": FORMAT, **settings})


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _task(
    out: Path,
    space: Space,
    how: SearchConfig,
    features: dict[str, Features],
    devices: list[torch.device],
    seed: int,
) -> Task:
    first = next(iter(features.values()))
    folds = assign_folds(first.classes, first.labels, how.folds, seed)
    deadline = None if how.timeout is None else time.time() + how.timeout
    return Task(out, space, how, features, folds, seed, deadline)


def _run(task: Task, devices: list[torch.device], progress: Progress) -> None:
    """Run the trials that are left, with a bar."""
    left = begin(task)
    jobs = task.search.jobs
    if jobs is None:
        one_cpu = task.search.devices is None and devices[0].type == "cpu"
        jobs = (os.cpu_count() or 1) if one_cpu else len(devices)
    jobs = max(1, min(jobs, left))
    places = [devices[number % len(devices)] for number in range(jobs)]
    bar = progress.add_task("trials", total=left, unit="trials", note="")
    best = [-np.inf]

    def say(outcome: dict[str, Any]) -> None:
        score = outcome["score"]
        if outcome["state"] == "complete" and score > best[0]:
            best[0] = score
            said = f"trial {outcome['number']}: {score:.4f}, the best so far"
            progress.console.print(said, markup=False)
        progress.update(bar, advance=1, note=f"best {best[0]:.4f}")

    run_trials(task, left, places, say, progress.console.print)
    progress.remove_task(bar)


def _confirmed(task: Task, whole: list[Any], device: torch.device) -> tuple[Any, list[float]]:
    """Score the best trials again on other folds; return the best by both, and those scores.

    The best of many scores is too good by chance; other folds are only partly so.
    """
    best = sorted(whole, key=lambda trial: -trial.value)[: max(task.search.confirm, 1)]
    if task.search.confirm == 0:
        return best[0], []
    first = next(iter(task.features.values()))
    folds = assign_folds(first.classes, first.labels, task.search.folds, task.seed + 1)
    features = {name: item.to(device) for name, item in task.features.items()}
    task = replace(task, features=features, seed=task.seed + 1000)
    again = []
    for trial in best:
        runner = trial_of(task, trial.params)
        again.append([fold_score(runner, task, folds, k) for k in range(task.search.folds)])
    place = int(np.argmax([t.value + np.mean(s) for t, s in zip(best, again, strict=True)]))
    return best[place], again[place]


def _means(features: Features) -> np.ndarray:
    """Return the mean over positions of the plain view, [n, C] fp32."""
    values = features.values[0]
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))
    return tensor.float().mean(1).cpu().numpy()


def _share_cache(out: Path) -> None:
    """Let the run find the features that the search computed."""
    folder = out / RUN / CACHE
    folder.mkdir(parents=True, exist_ok=True)
    for path in (out / CACHE).glob("*.npy"):
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)
