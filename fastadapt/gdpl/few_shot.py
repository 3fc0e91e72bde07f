"""Choose few-shot data: the images that train, and the base and novel classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastadapt.data.dataset import Dataset, Sample
from fastadapt.errors import InputError, counted, nearest
from fastadapt.files import read_json


def sample_shots(samples: Sequence[Sample], shots: int, seed: int) -> list[Sample]:
    """Draw ``shots`` images of every class without replacement; all of a class that has fewer.

    Args:
        samples: of the training split.
        shots: images per class; 0 for all.
        seed: of the draw.
    """
    if shots < 0:
        raise InputError(f"shots is {shots}; expected the images per class, or 0 for all")
    if shots == 0:
        return list(samples)
    rng = np.random.default_rng(seed)
    chosen = []
    for label in sorted({sample.label for sample in samples}):
        members = [i for i, sample in enumerate(samples) if sample.label == label]
        chosen += rng.permutation(members)[:shots].tolist()
    return [samples[i] for i in sorted(chosen)]


def draw_splits(dataset: Dataset, val_fraction: float, test_fraction: float) -> Dataset:
    """Split a data set that has no splits of its own into training, validation and test.

    Each class is split apart, into whole images: the training and validation shares are rounded,
    and the rest is tested. The draw is the same for every seed of training.

    Args:
        dataset: is returned as it is where a split was given.
        val_fraction: share of each class for validation.
        test_fraction: share of each class to test on; with 0 nothing is changed.

    Raises:
        InputError: a split would have no image of a class.

    Source: upstream's ``read_and_split_data``: 50 %, 20 % and 30 %.
    """
    if not test_fraction or not dataset.val_drawn or dataset.split("test"):
        return dataset
    rng = np.random.default_rng(0)
    samples = list(dataset.samples)
    for label, name in enumerate(dataset.classes):
        members = rng.permutation([i for i, s in enumerate(samples) if s.label == label])
        train = round(len(members) * (1 - val_fraction - test_fraction))
        val = round(len(members) * val_fraction)
        parts = {"train": members[:train], "val": members[train : train + val]}
        parts["test"] = members[train + val :]
        for split, places in parts.items():
            if not len(places):
                raise InputError(
                    f"class {name!r} has {counted(len(members), 'image')}, too few for training, "
                    "validation "
                    "and test: add images, give splits, or leave `test_fraction` out"
                )
            for place in places:
                samples[place] = replace(samples[place], split=split)
    return replace(dataset, samples=tuple(samples))


def split_classes(count: int) -> tuple[range, range]:
    """Split classes into base (the first half, rounded up) and novel, as the paper does.

    Raises:
        InputError: fewer than 4 classes, so that a half would have only one class.
    """
    if count < 4:
        raise InputError(
            f"the data set has {counted(count, 'class', 'classes')}; base-to-novel evaluation "
            "needs at least 4, two on "
            "each side: train on all of them with `train_classes='all'`"
        )
    middle = math.ceil(count / 2)
    return range(middle), range(middle, count)


def of_classes(samples: Sequence[Sample], classes: range) -> list[Sample]:
    """Return the samples of these classes, labelled from 0 again."""
    return [replace(s, label=s.label - classes.start) for s in samples if s.label in classes]


def evaluation_samples(dataset: Dataset) -> list[Sample]:
    """Return the test split if there is one, else the validation split."""
    return dataset.split("test") or dataset.split("val")


def read_names(path: str | Path | None, datasets: Sequence[Dataset]) -> dict[str, str]:
    """Read the names of classes in the texts, where they differ from their folders' names.

    Args:
        path: a JSON object from folder names to names, for some or all of them; none if ``None``.
        datasets: which may have these folders.

    Raises:
        InputError: the file is no such object, or no data set has one of the folders.
    """
    names = {} if path is None else read_json(path)
    folders = {folder for dataset in datasets for folder in dataset.classes}
    for folder, name in names.items():
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{path} calls {folder!r} {name!r}; expected a name")
        if folder not in folders:
            raise InputError(
                f"{path} names the class {folder!r}, which no data set has. "
                f"Nearest: {nearest(folder, folders)}"
            )
    return names


def harmonic_mean(a: float, b: float) -> float:
    """Return the harmonic mean of two accuracies; 0 if both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0
