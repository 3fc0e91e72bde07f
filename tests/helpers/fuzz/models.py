"""A small run, the bundle made of it, and a PEFT folder, which the targets damage."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import fastadapt as fa
from fastadapt.config import LoRAConfig
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_run
from fastadapt.lora import lora_layers

SIZE = (3, 32, 32)
LABELS = ["crack", "good"]


def make_run(folder: Path, seed: int = 0) -> Path:
    """Write a run as training leaves it, with its backbone's weights beside it."""
    torch.manual_seed(seed)
    backbone = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(backbone.state_dict(), folder / "weights.pth")
    config = fa.AdaptConfig(rank=4, num_centers=3, lora=LoRAConfig(r=2), input_size=SIZE)
    model = fa.adapt("test_vit", config, 2, weights=str(folder / "weights.pth"))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["all"], std=0.3)
    preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg).to_dict()
    fa.save_adapter(model, folder / "run", labels=LABELS, preprocess=preprocess)
    return folder / "run"


def make_bundle(folder: Path, seed: int = 0) -> Path:
    """Export the run; the manifest counts as made here in the folder's own state."""
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    rng = np.random.default_rng(0)
    for index in range(8):
        path = folder / "images" / LABELS[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    run = make_run(folder, seed)
    with patch("fastadapt.export.bundle.build.measure", lambda *args: {"1": 1.0}):
        export_run(run, folder / "bundle", images=folder / "images")
    return folder / "bundle"


def picture() -> Image.Image:
    """Return the image by which two loaded models are compared."""
    pixels = np.random.default_rng(1).integers(0, 256, (37, 41, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
