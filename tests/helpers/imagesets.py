"""Small image sets that a model can learn: each class is one pattern of stripes."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("crossed", "lying", "upright")


def picture(kind: str, rng: np.random.Generator, size: int = 40) -> Image.Image:
    """uint8 RGB stripes with noise and a random phase."""
    wave = 60 * np.sign(np.sin(np.arange(size) * 0.8 + rng.uniform(0, 6)))
    lying, upright = wave[:, None], wave[None, :]
    pattern = {"crossed": lying * upright / 60, "lying": lying, "upright": upright}[kind]
    values = 128 + pattern[..., None] + rng.normal(0, 15, (size, size, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def make_folders(
    root: Path, per_class: int = 12, classes=CLASSES, seed: int = 0, suffix: str = ".png"
) -> Path:
    """A folder of class folders with PNGs, or images of another kind."""
    rng = np.random.default_rng(seed)
    for kind in classes:
        (root / kind).mkdir(parents=True)
        for index in range(per_class):
            picture(kind, rng).save(root / kind / f"{index:02d}{suffix}")
    return root


def put_image(path: Path, level: int = 100) -> Path:
    """Write a small gray image, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path)
    return path


def truncate(path: Path) -> None:
    """Cuts a file in half, as a broken copy does."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_csv(path, rows, header=("path", "label", "split")):
    """Write rows below a header, of which as many names as they have columns."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header[: len(rows[0])] if rows else header, *rows])
    return path
