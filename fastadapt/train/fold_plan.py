"""Plan training on folds: which images are in which fold, which runs there are, and where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from fastadapt.data.dataset import Dataset
from fastadapt.data.folds import (
    assign_folds,
    fold_names,
    given_folds,
    joined_groups,
    missing_class,
    rotate,
)
from fastadapt.data.scan import Scanned
from fastadapt.errors import InputError, counted, form
from fastadapt.files import is_temporary
from fastadapt.locks import LOCK
from fastadapt.train.fold_results import FOLDS, TABLE, PlannedRun, read_folds
from fastadapt.train.fold_settings import FoldSettings
from fastadapt.train.request import REQUEST
from fastadapt.train.run_folder import CACHE, EVALUATION, MISTAKES, SPLITS, remove_run

OURS = {FOLDS, TABLE, SPLITS, CACHE, EVALUATION, MISTAKES, REQUEST}
RUN_FOLDERS = ("fold-", "seed-")


def parts_of(
    found: Scanned, folds: FoldSettings, seed: int, progress: Progress
) -> tuple[list[int], list[Dataset]]:
    """Return each image's fold, from 1, and the data set with the splits of each fold's run."""
    dataset, say = found.dataset, progress.console.print
    if folds.folds is None:
        return [], [dataset]
    samples, count = dataset.samples, folds.folds
    labels = [sample.label for sample in samples]
    place = {sample.path: number for number, sample in enumerate(samples)}
    copies = [[place[path] for path in paths] for paths in found.copies]
    if any(sample.fold for sample in samples):
        numbers = _folds_of_column(dataset, count)
        groups = {sample.group: set[str]() for sample in samples if sample.group}
        for sample in samples:
            if sample.group:
                groups[sample.group].add(sample.fold)
        torn = [name for name, inside in groups.items() if len(inside) > 1]
        if torn:
            say(
                f"warning: {len(torn)} of {counted(len(groups), 'group')} "
                f"{form(len(torn), 'has', 'have')} images in several folds "
                f"(first {torn[0]!r}): scores say nothing of new groups"
            )
        mixed = [places for places in copies if len({numbers[p] for p in places}) > 1]
        if mixed:
            say(
                f"warning: {sum(map(len, mixed))} images have the same bytes as one of another "
                f"fold (first {samples[mixed[0][0]].path}): their scores say nothing of new images"
            )
    else:
        grouped = any(sample.group for sample in samples)
        names = [sample.group if grouped else str(sample.path) for sample in samples]
        if grouped and len(set(names)) == 1:
            assign_folds(dataset.classes, labels, count, seed, names)  # says what is wrong
        joined, merged = joined_groups(names, copies)
        if merged:
            what = "groups share images" if grouped else "images are there twice"
            say(f"{merged} {what}, by their bytes: they are kept in one fold")
        together = joined if grouped or merged else None
        numbers = assign_folds(dataset.classes, labels, count, seed, together).tolist()
    parts = []
    for fold in rotate(np.array(numbers), count):
        splits = ["train"] * len(samples)
        for split, places in fold.splits().items():
            for place_ in places:
                splits[place_] = split
        parts.append(dataset.with_splits(splits))
    return [number + 1 for number in numbers], parts


def _folds_of_column(dataset: Dataset, count: int) -> list[int]:
    """Return the folds that the table gives, from 0; refuse one without a class."""
    names = [sample.fold for sample in dataset.samples]
    if not all(names):
        raise InputError(
            f"the column 'fold' has no value in {names.count('')} of "
            f"{counted(len(names), 'row')}: give one "
            "for every row, or remove the column"
        )
    numbers = given_folds(names, count)
    labels = np.array([sample.label for sample in dataset.samples])
    missing = missing_class(numbers, labels, count, len(dataset.classes))
    if missing is not None:
        raise InputError(
            f"fold {fold_names(names)[missing[0]]} has no image of class "
            f"{dataset.classes[missing[1]]!r}; every fold needs one of every class"
        )
    return numbers.tolist()


def plan_of(folds: FoldSettings, seeds: Sequence[int]) -> list[PlannedRun]:
    """List the runs: seed by seed within a fold."""
    if folds.folds is None:
        return [PlannedRun(f"seed-{seed}", None, seed) for seed in seeds]
    plan = []
    for fold in range(1, folds.folds + 1):
        for seed in seeds:
            name = f"fold-{fold}" if len(seeds) == 1 else f"fold-{fold}-seed-{seed}"
            plan.append(PlannedRun(name, fold, seed))
    return plan


def check_out(
    out: Path, folds: FoldSettings, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Refuse a folder that must not be written to; return the ``folds.json`` to resume from."""
    if resume and overwrite:
        raise InputError("`resume` and `overwrite` exclude each other: give one of them")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; expected a folder")
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    found = {name for name in found if name != LOCK and not is_temporary(name, OURS)}
    foreign = sorted(n for n in found - OURS if not n.startswith(RUN_FOLDERS))
    if found - {CACHE} and FOLDS not in found:
        raise InputError(
            f"{out} holds other files, {sorted(found)[0]!r} for one: give a new or empty folder as "
            "`out`"
        )
    if foreign and overwrite:
        raise InputError(
            f"{out} holds {foreign[0]!r} beside its runs: move it away, or give another `out`"
        )
    if resume:
        if FOLDS not in found:
            raise InputError(f"{out} holds no folds, so there is nothing to resume")
        return read_folds(out)
    if FOLDS in found and not overwrite:
        done = read_folds(out)["finished"]
        raise InputError(
            f"{out} holds {'' if done else 'unfinished '}folds already: give another `out`, "
            f"`overwrite=True`{'' if done else ', or go on with `resume=True`'}"
        )
    return None


def remove_others(out: Path, plan: Sequence[PlannedRun]) -> None:
    """Remove an earlier plan's runs; files of others in their folders stay."""
    kept = {run.folder for run in plan}
    for path in out.iterdir():
        if path.name.startswith(RUN_FOLDERS) and path.name not in kept and not path.is_symlink():
            remove_run(path)
