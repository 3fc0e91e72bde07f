"""Matrix products resize as Pillow does."""

import numpy as np
import pytest
import torch

from fastadapt.data import gpu_resize
from fastadapt.data.gpu_resize import Resizer
from fastadapt.data.resize import Geometry
from tests.helpers.jpegs import smooth

GEOMETRIES = [
    Geometry(24, 24, "bicubic", 0.875, "center"),
    Geometry(20, 28, "bilinear", 1.0, "squash"),
    Geometry(26, 22, "bicubic", 1.0, "border"),
    Geometry(64, 64, "bilinear", 1.0, "center"),  # larger than most: enlarged
    Geometry(21, 40, "bicubic", 0.9, "center"),  # sides of different length
]


def check(geometry, device):
    resize = Resizer(geometry)
    for width, height in ((60, 44), (41, 90), (24, 24), (27, 600), (60, 44)):
        images = [smooth(seed, width, height) for seed in range(8)]
        expected = np.stack([np.asarray(geometry.apply(image)) for image in images]).astype(int)
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
        result = resize(pixels.permute(0, 3, 1, 2).to(device)).permute(0, 2, 3, 1)
        assert result.dtype == torch.uint8
        assert np.abs(result.cpu().numpy() - expected).max() <= 1  # roundings in between differ


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pixels_are_those_of_pillow(geometry, monkeypatch):
    check(geometry, "cpu")
    monkeypatch.setattr(gpu_resize, "KEPT", 2)
    check(geometry, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pixels_are_those_of_pillow_on_a_gpu(geometry):
    check(geometry, "cuda")
