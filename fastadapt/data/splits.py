"""Name the splits of a data set, and draw a validation split where there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from fastadapt.errors import InputError

SPLITS = ("train", "val", "test")
_STEMS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# TrainSet, test_data, "validation images", Training_Dataset
_PATTERN = re.compile(
    rf"({'|'.join(_STEMS)})(?:[\s_.-]*(?:set|split|data|dataset|images|imgs))?", re.IGNORECASE
)


def split_of(name: str) -> str:
    """Return the split that a folder's or a column's word names; ``""`` if it names none.

    ``Training``, ``TRAIN``, ``valid``, ``Validation``, ``test_set`` and their like are understood.
    """
    match = _PATTERN.fullmatch(name.strip())
    return _STEMS[match[1].lower()] if match else ""


def draw_val(classes: Sequence[str], labels: Sequence[int], fraction: float, seed: int) -> set[int]:
    """Draw a share of every class for validation: at least one image, never all.

    Args:
        classes: names, for the error message.
        labels: of the training images, indices into ``classes``.
        fraction: share of each class, rounded to whole images.
        seed: of the draw.

    Returns:
        Indices into ``labels``.

    Raises:
        InputError: a class has a single image.
    """
    rng = np.random.default_rng(seed)
    drawn: set[int] = set()
    for label, name in enumerate(classes):
        members = [i for i, other in enumerate(labels) if other == label]
        if len(members) < 2:
            raise InputError(
                f"class {name!r} has a single training image, which cannot be split into training "
                "and validation: add images, or give a split column with a val split"
            )
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        drawn.update(rng.permutation(members)[:count].tolist())
    return drawn


def draw_val_groups(
    classes: Sequence[str],
    labels: Sequence[int],
    groups: Sequence[str],
    fraction: float,
    seed: int,
) -> set[int]:
    """Draw whole groups for validation, near to a share of every class: some of each, never all.

    Args:
        classes, labels, fraction, seed: as for :func:`draw_val`.
        groups: of the training images.

    Returns:
        Indices into ``labels``.

    Raises:
        InputError: a class cannot be in both splits, since too few groups have images of it.
    """
    names = sorted(set(groups))
    place = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, ([place[group] for group in groups], list(labels)), 1)
    total = counts.sum(0)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen: list[int] = []

    def distance(*more: int) -> float:
        """Return how far the classes' shares are from what is wanted, with more groups drawn."""
        drawn = counts[[*chosen, *more]].sum(0)
        return float((np.abs(drawn - fraction * total) / total).sum())

    def leaves_all(group: int) -> bool:
        return bool((counts[[*chosen, group]].sum(0) < total).all())

    for label in np.argsort((counts > 0).sum(0), kind="stable"):
        if counts[chosen, label].any():
            continue
        fitting = [g for g in order if counts[g, label] and leaves_all(g)]
        if not fitting:
            raise InputError(
                f"class {classes[label]!r} cannot be in training and in validation: its images "
                f"are of too few groups ({int((counts[:, label] > 0).sum())}), which stay "
                "together; add groups, or give a split column with a val split"
            )
        chosen.append(min(fitting, key=distance))
    for group in order:
        if group not in chosen and leaves_all(group) and distance(group) < distance():
            chosen.append(group)
    kept = {names[group] for group in chosen}
    return {index for index, group in enumerate(groups) if group in kept}
