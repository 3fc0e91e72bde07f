"""The loader of a user's own loop."""

import pytest
import torch

import fastadapt as fa
from fastadapt.data.dataset import read_dataset
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders

PREPROCESS = Preprocess((3, 32, 32))


@pytest.fixture
def data(tmp_path):
    return make_folders(tmp_path / "data", 10)


def test_epochs_differ_and_follow_from_seed_and_number(data):
    loader = fa.ImageLoader(data, PREPROCESS, 5, augment="flips")
    assert loader.classes == CLASSES
    first, second = list(loader), list(loader)
    assert len(first) == len(loader) == len(read_dataset(data).split("train")) // 5
    assert all(images.shape == (5, 3, 32, 32) for images, _ in first)
    assert not torch.equal(first[0][0], second[0][0])
    again = fa.ImageLoader(data, PREPROCESS, 5, augment="flips")
    again.epoch = 1  # as after an interruption
    for (one, labels), (other, expected) in zip(again, second, strict=True):
        assert torch.equal(one, other) and torch.equal(labels, expected)


def test_validation_is_whole_and_in_order(data):
    loader = fa.ImageLoader(data, {"input_size": (3, 32, 32)}, 4, split="val")
    samples = read_dataset(data).split("val")
    labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == [sample.label for sample in samples]
    assert len(list(loader)) == len(loader) == -(-len(samples) // 4)


def test_what_does_not_fit_is_refused(data):
    with pytest.raises(InputError, match="batch_size is 0"):
        fa.ImageLoader(data, PREPROCESS, 0)
    with pytest.raises(InputError, match="no 'test' split"):
        fa.ImageLoader(data, PREPROCESS, 4, split="test")
    with pytest.raises(InputError, match="augment is 'blur'"):
        fa.ImageLoader(data, PREPROCESS, 4, augment="blur")
