import numpy as np
import pytest
from PIL import Image

from fastadapt.data.preprocess import Preprocess
from fastadapt.export.bundle.samples import (
    Sample,
    choose,
    folder_samples,
    read_pixels,
    synthetic_samples,
)
from fastadapt.export.graph_input import GraphInput
from tests.helpers.imagesets import make_folders

SIZE = 32
PRE = Preprocess((3, SIZE, SIZE))


@pytest.fixture
def images(tmp_path):
    return make_folders(tmp_path / "images", per_class=3)


class TestSamples:
    def test_synthetic_ones_vary_and_are_the_same_every_time(self):
        pre = Preprocess((3, 48, 64))
        samples = synthetic_samples(pre)
        assert samples.origin.startswith("synthetic")
        pixels = np.stack([np.asarray(sample.read()) for sample in samples.samples])
        assert pixels.shape == (16, 48, 64, 3)
        again = [np.asarray(sample.read()) for sample in synthetic_samples(pre).samples]
        assert np.array_equal(pixels, again)
        assert pixels.std(axis=0).min() > 5 and pixels.std(axis=(1, 2)).min() > 5
        assert samples.calibration == samples.validation == ()

    def test_no_image_calibrates_and_judges(self, images):
        samples = folder_samples(images, 5)
        assert set(samples.calibration) | set(samples.validation) == set(samples.samples)
        assert not set(samples.calibration) & set(samples.validation)
        assert len({sample.label for sample in choose(samples.samples, 3)}) == 3


def test_large_photos_are_stored_smaller(tmp_path):
    """Golden samples of a graph that resizes are decoded images, of one size."""
    samples = []
    for index, size in enumerate([(2048, 1024), (2048, 1024), (300, 200)]):
        Image.new("RGB", size, (index, 9, 9)).save(tmp_path / f"{index}.png")
        samples.append(Sample(tmp_path / f"{index}.png"))
    pixels = read_pixels(samples, GraphInput(PRE, resize=True))
    assert pixels.given.shape == (3, 3, 512, 1024)
    assert pixels.model.shape == pixels.training.shape == (3, 3, SIZE, SIZE)
