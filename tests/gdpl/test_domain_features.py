from pathlib import Path

import pytest
import torch

import fastadapt as fa
from fastadapt.files import write_tensors
from fastadapt.gdpl import FeatureTable

ROOT = Path("/data")


@pytest.fixture
def write(tmp_path):
    def call(tensors):
        write_tensors(tmp_path / "f.safetensors", tensors)
        return tmp_path / "f.safetensors"

    return call


def test_keys_are_ends_of_paths(write):
    vectors = torch.randn(3, 5)
    keys = ("forest/1.png", "test/forest/1.png", "river/1.png")
    table = FeatureTable.read(write(dict(zip(keys, vectors, strict=True))))
    paths = [ROOT / "train/forest/1.png", ROOT / "train/river/1.png", ROOT / "test/forest/1.png"]
    assert table.width == 5
    assert torch.equal(table.of(paths), vectors[[0, 2, 1]])  # the longest key counts
    assert torch.equal(table.of([paths[0], paths[0]]), vectors[[0, 0]])


def test_a_key_that_fits_two_images(write):
    table = FeatureTable.read(write({"forest/1.png": torch.zeros(2)}))
    with pytest.raises(fa.InputError, match=r"fits /data/a/forest/1.png and /data/b/forest/1.png"):
        table.of([ROOT / "a/forest/1.png", ROOT / "b/forest/1.png"])


def test_images_without_features(write):
    table = FeatureTable.read(write({"forest/1.png": torch.zeros(2)}))
    with pytest.raises(fa.InputError, match=r"no feature of .*2.png: .*'forest/2.png'.*Nearest"):
        table.of([ROOT / "forest/2.png"])


@pytest.mark.parametrize(
    ("tensors", "width", "says"),
    [
        ({}, None, "holds no features"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, None, r"'b' has shape \(4,\); expected \[3\]"),
        ({"a": torch.zeros(1, 3)}, None, r"'a' has shape \(1, 3\); expected \[3\]"),
        ({"a": torch.zeros(3)}, 7, r"expected \[7\], since the model takes that"),
        ({"a": torch.full((3,), torch.nan)}, None, "NaN or infinite"),
    ],
    ids=["none", "widths", "matrix", "model", "nan"],
)
def test_files_that_do_not_fit(write, tensors, width, says):
    with pytest.raises(fa.InputError, match=says):
        FeatureTable.read(write(tensors), width)


def test_the_fingerprint_is_of_the_content(write):
    a = FeatureTable.read(write({"a": torch.zeros(3)})).fingerprint()
    b = FeatureTable.read(write({"a": torch.ones(3)})).fingerprint()
    assert a != b
