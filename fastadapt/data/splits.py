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
