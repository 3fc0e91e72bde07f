"""Make random views of an image, each a function of its seed alone."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastadapt.data.decode import load_image
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError

AUGMENTS = ("none", "flips", "dihedral", "crops")
CROP_AREA = (0.5, 1.0)  # small data sets: ImageNet's 0.08 would often cut the defect away
CROP_ASPECT = (3 / 4, 4 / 3)


def read_view(
    path: str | os.PathLike[str],
    preprocess: Preprocess,
    augment: str = "none",
    seed: tuple[int, ...] | None = None,
) -> Tensor:
    """Read an image file as uint8 [3, H, W], augmented.

    Args:
        path: of the image.
        preprocess: range of values, size, crop and interpolation of the plain view.
        augment: ``"none"``; ``"flips"``, left-right and up-down; ``"dihedral"``, the eight
            symmetries of the square; ``"crops"``, random resized crops and flips.
        seed: integers that decide the view; ``None`` for the plain view, as in evaluation.

    Raises:
        InputError: as :func:`fastadapt.data.decode.load_image`.
    """
    image = load_image(path, preprocess.intensity_range)
    if augment == "none" or seed is None:
        return preprocess.transform(image)
    rng = np.random.default_rng(seed)
    if augment == "crops":
        _, height, width = preprocess.input_size
        resample = Image.Resampling[preprocess.interpolation.upper()]
        image = image.resize((width, height), resample, box=_crop_box(image.size, rng))
        view = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    else:
        view = preprocess.transform(image)
    if rng.random() < 0.5:
        view = view.flip(2)
    if rng.random() < 0.5:
        view = view.flip(1)
    if augment == "dihedral" and rng.random() < 0.5:
        view = view.transpose(1, 2)
    return view.contiguous()


def check_augment(augment: str, preprocess: Preprocess) -> None:
    """Refuse an unknown augmentation, or one that the image size rules out.

    Raises:
        InputError: as said.
    """
    if augment not in AUGMENTS:
        raise InputError(f"augment is {augment!r}; expected one of {', '.join(AUGMENTS)}")
    _, height, width = preprocess.input_size
    if augment == "dihedral" and height != width:
        raise InputError(f"augment 'dihedral' needs square images; these are {height}×{width}")


def _crop_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Draw (left, top, right, bottom) of a part of the image, in pixels."""
    width, height = size
    area = width * height * rng.uniform(*CROP_AREA)
    aspect = math.exp(rng.uniform(*np.log(CROP_ASPECT)))
    crop_width = min(math.sqrt(area * aspect), width)
    crop_height = min(math.sqrt(area / aspect), height)
    left = rng.uniform(0, width - crop_width)
    top = rng.uniform(0, height - crop_height)
    return left, top, left + crop_width, top + crop_height
