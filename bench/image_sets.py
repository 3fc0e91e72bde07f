"""Image sets that need no download: photographs, scans, and generated ones of known structure.

- ``solar cells, 2 classes`` and ``4 classes``: electroluminescence images of the package
  elpv-dataset (Deitsch et al. 2019), functional or defective, or by the defect's probability.
- ``shifted digits``: scikit-learn's digits, rotated by 35°, pale, blurred and noisy.
- ``generated textures``: gratings of two directions, with and without a rare mark of a few pixels;
  30 images of the rare classes. What tells the classes apart is known, and is not in the mean.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

SOLAR_SIZE = 300  # the cells' own size: cracks are a few pixels wide
DIGIT_SIZE = 96
TEXTURE_SIZE = 160
TEXTURES = {"lying": 90, "upright": 90, "lying, marked": 30, "upright, marked": 30}


@dataclass(frozen=True)
class ImageSet:
    """Labelled image files.

    Attributes:
        name: for tables.
        size: height and width that a backbone gets, in pixels.
        paths: of the files.
        labels: [n], indices into ``classes``.
        strata: [n], what splits are stratified by: the class, or finer.
        classes: names, sorted.
    """

    name: str
    size: int
    paths: tuple[Path, ...]
    labels: np.ndarray
    strata: tuple[str, ...]
    classes: tuple[str, ...]


def image_sets(folder: Path, limit: int | None = None) -> list[ImageSet]:
    """Return all sets that can be had here; generated files go to ``folder``.

    Args:
        folder: for generated images.
        limit: about this many images of each set at most, for trials.
    """
    found = []
    if importlib.util.find_spec("elpv_dataset") is not None:
        found += solar_cells()
    found += [shifted_digits(folder / "digits"), generated_textures(folder / "textures")]
    return [item if limit is None else _thinned(item, limit) for item in found]


def solar_cells() -> list[ImageSet]:
    """Return the cells of elpv-dataset as two classes and as four."""
    import elpv_dataset

    folder = Path(elpv_dataset.__file__).parent / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line]
    paths = tuple(folder / path for path, _, _ in rows)
    probabilities = [float(probability) for _, probability, _ in rows]
    strata = tuple(f"{float(p):.2f} {kind}" for _, p, kind in rows)
    found = []
    for name, labels in (
        (
            "solar cells, 2 classes",
            ["functional" if p < 0.5 else "defective" for p in probabilities],
        ),
        ("solar cells, 4 classes", [f"{p:.0%}" for p in probabilities]),
    ):
        found.append(_labelled(name, SOLAR_SIZE, paths, labels, strata))
    return found


def shifted_digits(folder: Path) -> ImageSet:
    """Write half of scikit-learn's digits as another domain, and return them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))[len(digits.target) // 2 :]
    rng, paths, labels = np.random.default_rng(1), [], []
    folder.mkdir(parents=True, exist_ok=True)
    for place, index in enumerate(order):
        pixels = (digits.images[index] / 16 * 255).astype(np.uint8)
        scan = Image.fromarray(pixels).resize((DIGIT_SIZE,) * 2, Image.Resampling.BICUBIC)
        crooked = scan.rotate(35, Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))
        values = 30 + 0.7 * np.asarray(crooked, np.float64)
        values += rng.normal(0, 25, values.shape)
        paths.append(folder / f"{place:04}.png")
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(paths[-1])
        labels.append(str(digits.target[index]))
    return _labelled("shifted digits", DIGIT_SIZE, tuple(paths), labels, tuple(labels))


def generated_textures(folder: Path) -> ImageSet:
    """Write noisy gratings, lying or upright, some with a rare mark, and return them."""
    rng, paths, labels = np.random.default_rng(2), [], []
    folder.mkdir(parents=True, exist_ok=True)
    size = TEXTURE_SIZE
    y, x = np.mgrid[:size, :size]
    for name, count in TEXTURES.items():
        for number in range(count):
            along = y if name.startswith("lying") else x
            across = x if along is y else y
            tilt, period = rng.uniform(-0.35, 0.35), rng.uniform(9, 18)
            phase = 2 * np.pi * ((along + tilt * across) / period + rng.uniform())
            values = 128 + rng.uniform(20, 45) * np.sin(phase) + rng.normal(0, 22, (size, size))
            if name.endswith("marked"):
                radius = rng.uniform(3, 6)
                cy, cx = rng.uniform(12, size - 12, 2)
                blob = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * radius**2))
                values += rng.choice((-1, 1)) * rng.uniform(90, 130) * blob
            paths.append(folder / f"{name.replace(', ', '-')}-{number:03}.png")
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(paths[-1])
            labels.append(name)
    return _labelled("generated textures", size, tuple(paths), labels, tuple(labels))


def _labelled(
    name: str, size: int, paths: tuple[Path, ...], labels: list[str], strata: tuple[str, ...]
) -> ImageSet:
    classes = tuple(sorted(set(labels)))
    index = np.array([classes.index(label) for label in labels], np.int64)
    return ImageSet(name, size, paths, index, strata, classes)


def _thinned(item: ImageSet, limit: int) -> ImageSet:
    """Return every k-th image, so that about ``limit`` are left."""
    keep = range(0, len(item.paths), max(1, len(item.paths) // limit))
    return ImageSet(
        item.name,
        item.size,
        tuple(item.paths[i] for i in keep),
        item.labels[list(keep)],
        tuple(item.strata[i] for i in keep),
        item.classes,
    )
