"""Draw images of two textures, so that the examples run without any data of yours."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("crossed", "striped")


def draw(kind: str, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw one RGB image [size, size]: waves in one direction, or in two."""
    phases = rng.uniform(0, 2 * np.pi, 2)
    across, along = (np.sin(np.arange(size) * 0.8 + phase) for phase in phases)
    waves = across[:, None] * along[None] if kind == "crossed" else np.tile(along, (size, 1))
    values = 128 + 60 * waves[..., None] + rng.normal(0, 15, (size, size, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def make_images(folder: Path, count: int = 16, size: int = 64, seed: int = 0) -> Path:
    """Write ``count`` PNG files into a folder for each class, and return ``folder``."""
    rng = np.random.default_rng(seed)
    for kind in CLASSES:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            draw(kind, rng, size).save(folder / kind / f"{index:03d}.png")
    return folder
