"""Split images into folds: stratified by class, and never with one group in two folds.

A group is what images have in common that a new image would not have: a patient, a slide, a solar
module. Of N images in K folds, fold k is held out once:

    (1)  fold [N] in 0 … K-1,  the same for all images of a group
    (2)  test = {n: fold[n] = k},  val = {n: fold[n] = (k + 1) mod K},  train = the rest

Nothing is chosen on the test images: validation, another fold, picks epoch and temperature.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fastadapt.errors import InputError, first_few

TRIES = 50  # draws of grouped folds, until every fold has every class
FEWEST, MOST = 2, 1000


class Fold(NamedTuple):
    """The images of one fold's run, as places in the list that was split.

    Attributes:
        number: of the fold that is held out, from 0.
        train, val, test: int64, ascending; ``test`` is empty where the held-out fold validates.
    """

    number: int
    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    def splits(self) -> dict[str, np.ndarray]:
        """Return the places by split; a split without images is left out."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {split: places for split, places in named.items() if len(places)}


def assign_folds(
    classes: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    count: int,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> np.ndarray:
    """Draw the fold of every image: scikit-learn's StratifiedKFold or StratifiedGroupKFold.

    Args:
        classes: K names, for messages.
        labels: [N], indices into ``classes``.
        count: of folds.
        seed: of the draw.
        groups: [N]; images of one group stay together. ``None`` where every image stands alone.

    Returns:
        [N] int64, from 0.

    Raises:
        InputError: fewer than two folds; a class with fewer images, or groups, than folds; one
            group only; no draw gives every fold an image of every class.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    targets = np.asarray(labels, np.int64)
    if not FEWEST <= count <= MOST:
        raise InputError(f"folds is {count}; expected {FEWEST} to {MOST}")
    if groups is not None and len(set(groups)) == 1:
        raise InputError(
            f"all {len(targets)} images are of one group, {next(iter(groups))!r}: folds would "
            "tear it apart; give each patient, slide or module a group of its own, or none"
        )
    grouped = groups is not None and len(set(groups)) < len(targets)
    numbers = _numbered(groups) if grouped and groups is not None else np.arange(len(targets))
    for label, name in enumerate(classes):
        members = np.unique(numbers[targets == label])
        if len(members) < count:
            what = "groups with images of it" if grouped else "images"
            raise InputError(
                f"class {name!r} has {len(members)} {what}, too few for {count} folds, which all "
                f"need one: give `folds={max(len(members), FEWEST)}` or fewer, or more images"
            )
    kind = StratifiedGroupKFold if grouped else StratifiedKFold
    seeds = np.random.SeedSequence(seed).generate_state(TRIES if grouped else 1)
    for state in seeds:
        folds = np.empty(len(targets), np.int64)
        splitter = kind(count, shuffle=True, random_state=int(state))
        with warnings.catch_warnings():  # what it warns of was refused above
            warnings.simplefilter("ignore", UserWarning)
            parts = splitter.split(np.zeros(len(targets)), targets, numbers)
            for number, (_, held_out) in enumerate(parts):
                folds[held_out] = number
        if missing_class(folds, targets, count, len(classes)) is None:
            return folds
    fold, label = missing_class(folds, targets, count, len(classes)) or (0, 0)
    raise InputError(
        f"fold {fold + 1} of {count} has no image of class {classes[label]!r}, however the groups "
        "are dealt: give fewer `folds`, or smaller groups"
    )


def rotate(folds: np.ndarray, count: int, test: bool = True) -> list[Fold]:
    """Return the splits of every fold's run, by (2).

    Args:
        folds: [N], from 0, of :func:`assign_folds`.
        count: of folds.
        test: whether the fold that is held out tests, and the next one validates. Of two folds,
            and if false, the one that is held out validates, and nothing tests.
    """
    runs = []
    for number in range(count):
        held_out = folds == number
        if test and count > FEWEST:
            val = folds == (number + 1) % count
            splits = (~(held_out | val), val, held_out)
        else:
            splits = (~held_out, held_out, np.zeros_like(held_out))
        runs.append(Fold(number, *(np.flatnonzero(split) for split in splits)))
    return runs


def chosen_folds(names: Sequence[str], val_fold: str, test_fold: str | None) -> list[str]:
    """Return the split of every image where a table gives folds, one to validate, one to test.

    Args:
        names: [N] folds, as the table has them.
        val_fold: the one that validates.
        test_fold: the one that tests; ``None`` if none does.

    Raises:
        InputError: a fold is none of the table's, both are the same, or nothing is left to train.
    """
    known = fold_names(names)
    for option, name in (("val_fold", val_fold), ("test_fold", test_fold)):
        if name is not None and name not in known:
            raise InputError(f"{option} is {name}; the folds are {first_few(known, 12)}")
    if val_fold == test_fold:
        raise InputError(f"val_fold and test_fold are both {val_fold}: give two different folds")
    if set(known) <= {val_fold, test_fold}:
        raise InputError(f"the folds are {first_few(known)}: none is left to train on")
    return [{val_fold: "val", test_fold: "test"}.get(name, "train") for name in names]


def given_folds(names: Sequence[str], count: int) -> np.ndarray:
    """Return the fold of every image, from 0, where a table gives them.

    Raises:
        InputError: the table has another number of folds.
    """
    known = fold_names(names)
    if len(known) != count:
        raise InputError(
            f"folds is {count}, but the column 'fold' has {len(known)}: {first_few(known, 12)}; "
            f"give `folds={len(known)}`, or remove the column"
        )
    place = {name: number for number, name in enumerate(known)}
    return np.array([place[name] for name in names], np.int64)


def fold_names(names: Iterable[str]) -> list[str]:
    """Return the different names of folds in order: 2 before 10."""

    def key(name: str) -> list[tuple[int, int, str]]:
        parts = re.findall(r"\d+|\D+", name)
        return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]

    return sorted(set(names), key=key)


def missing_class(
    folds: np.ndarray, labels: np.ndarray, count: int, classes: int
) -> tuple[int, int] | None:
    """Return the first fold without an image of a class, and that class; None if there is none."""
    table = np.zeros((count, classes), np.int64)
    np.add.at(table, (folds, labels), 1)
    empty = np.argwhere(table == 0)
    return (int(empty[0][0]), int(empty[0][1])) if len(empty) else None


def joined_groups(
    groups: Sequence[Hashable], together: Iterable[Sequence[int]]
) -> tuple[list[int], int]:
    """Merge groups that have images in common with each other.

    Args:
        groups: [N].
        together: places of images that must stay together: those of the same bytes.

    Returns:
        [N] the number of each image's group, and how many groups were merged into others.
    """
    numbers = _numbered(groups)
    root = list(range(int(numbers.max(initial=-1)) + 1))

    def find(number: int) -> int:
        while root[number] != number:
            root[number] = number = root[root[number]]
        return number

    merged = 0
    for places in together:
        first = find(int(numbers[places[0]]))
        for place in places[1:]:
            other = find(int(numbers[place]))
            if other != first:
                root[other], merged = first, merged + 1
    return [find(int(number)) for number in numbers], merged


def _numbered(groups: Sequence[Hashable]) -> np.ndarray:
    """Give groups numbers in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)
