"""Write what the prediction benchmark reads: photographs, and a bundle of a model."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from fastadapt.data.decode_pool import default_workers
from fastadapt.export import EngineOptions, export_timm
from fastadapt.export.settings import Batches

PHOTO = (500, 375)  # width and height in pixels, of most of ImageNet's
DISTINCT = 512
CLASSES = 10


def write_photos(folder: Path, count: int) -> None:
    """Write ``count`` JPEGs of 500 × 375 pixels, some 90 KB each; few differ, the others are links.

    Args:
        folder: made anew.
        count: number of files.
    """
    folder.mkdir()
    distinct = min(DISTINCT, count)
    with ThreadPoolExecutor(default_workers()) as pool:
        names = [str(folder / f"{index:06}.jpg") for index in range(distinct)]
        list(pool.map(_write_photo, names, range(distinct)))
    for index in range(distinct, count):
        os.link(folder / f"{index % distinct:06}.jpg", folder / f"{index:06}.jpg")


def _write_photo(name: str, seed: int) -> None:
    """Write smooth colours with texture, which compress about as photographs do."""
    rng = np.random.default_rng(seed)
    width, height = PHOTO
    pixels = np.full((height, width, 3), rng.uniform(40, 215, 3), np.float32)
    contrast = rng.uniform(0.3, 1.2)
    for cells, strength in ((4, 90), (25, 40), (125, 25)):
        coarse = rng.integers(0, 256, (cells * 3 // 4 + 1, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC)
        pixels += (np.asarray(smooth, np.float32) - 128) * contrast * strength / 128
    pixels += rng.normal(0, 9, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(name, quality=90)


def write_bundle(folder: Path, name: str, photos: Path, *, size: int, compiled: bool) -> Path:
    """Export a backbone with random weights, ten classes and features.

    Args:
        folder: where weights and bundle go.
        name: timm's, of the backbone.
        photos: images to compare on.
        size: of the model's images, in pixels.
        compiled: make a .pt2 in bf16, too.

    Returns:
        The bundle.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, img_size=size) if "vit" in name else None
    model = model or timm.create_model(name, num_classes=CLASSES)
    nn.init.normal_(model.get_classifier().weight, std=0.5)
    torch.save(model.state_dict(), folder / "weights.pth")
    few = folder / "few"
    few.mkdir()
    for photo in sorted(photos.iterdir())[:16]:
        os.link(photo, few / photo.name)
    options = EngineOptions()
    if compiled:
        options = EngineOptions(aoti=True, precision="bf16", batch=Batches(1, 64, 256))
    export_timm(
        name,
        folder / "bundle",
        checkpoint=folder / "weights.pth",
        image_size=size,
        images=few,
        with_features=True,
        speed=compiled,  # which file is the fastest decides which one runs
        engines=options,
    )
    return folder / "bundle"
