"""Batches are the same whether images are kept or streamed, and nothing decodes beside training."""

import builtins
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from fastadapt.config import AdaptConfig
from fastadapt.data.dataset import read_dataset
from fastadapt.data.images import ImageSource, lock_pages
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.train import loop
from fastadapt.train.config import TrainConfig
from fastadapt.train.run import train
from tests.helpers.imagesets import make_folders

CPU = torch.device("cpu")
PREPROCESS = Preprocess((3, 32, 32))


@pytest.fixture
def samples(tmp_path):
    return read_dataset(make_folders(tmp_path / "data", 8)).split("train")


@pytest.mark.parametrize("augment", ["none", "dihedral", "crops"])
def test_kept_and_streamed_images_are_the_same(samples, augment):
    kept = ImageSource(samples, PREPROCESS, CPU, 2, augment)
    streamed = ImageSource(samples, PREPROCESS, CPU, 2, augment, resident=False)
    order = np.random.default_rng(0).permutation(len(samples))
    for view in (None, 0, 1, 5):
        views = None if view is None else np.full(len(samples), view)
        pairs = zip(kept.batches(order, views, 4), streamed.batches(order, views, 4), strict=True)
        for (one, labels), (other, expected) in pairs:
            assert torch.equal(one, other) and torch.equal(labels, expected)


def test_plain_images_are_what_preprocessing_reads(samples):
    source = ImageSource(samples, PREPROCESS, CPU, 1, "flips")
    images, labels = next(source.batches(np.array([3, 1]), None, 8))
    expected = torch.stack([PREPROCESS.read(samples[i].path) for i in (3, 1)])
    assert torch.equal(images, PREPROCESS.normalize(expected))
    assert labels.tolist() == [samples[3].label, samples[1].label]


@pytest.mark.parametrize("resident", [None, False])
def test_an_image_that_went_away_is_named(samples, resident):
    source = ImageSource(samples, PREPROCESS, CPU, 1, resident=resident)
    samples[2].path.unlink()
    with pytest.raises(InputError, match=samples[2].path.name):
        list(source.batches(np.arange(len(samples)), None, 4))


class Ring:
    def __init__(self):
        self.slots = np.zeros((2, 3), np.uint8)


def test_locked_pages_are_unlocked_with_their_ring(monkeypatch):
    locked, calls, answer = set(), [], [0]

    def register(address, size, flags):
        if not answer[0]:
            locked.add(address)
        return answer[0]

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=locked.remove)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    ring = Ring()
    lock_pages(ring, CPU)
    assert locked == {ring.slots.ctypes.data}
    del ring
    assert not locked
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: calls.append(1) or 1 / 0)
    answer[0] = 712  # already registered
    with pytest.raises(ZeroDivisionError):
        lock_pages(Ring(), CPU)
    assert calls and not locked


def test_nothing_decodes_and_no_image_is_opened_while_steps_run(tmp_path, monkeypatch):
    data = make_folders(tmp_path / "data", 50)  # more than are decoded without processes
    images = {str(path) for path in data.rglob("*.png")}
    opened, problems = [], []
    plain_open, epoch = builtins.open, loop.Trainer._train_epoch

    def spy(file, *args, **kwargs):
        opened.append(str(file))
        return plain_open(file, *args, **kwargs)

    def watched(self, *args):
        children = [child.cmdline() for child in psutil.Process().children()]
        problems.extend(c for c in children if any("decode_worker" in word for word in c))
        problems.extend(t.name for t in threading.enumerate() if "decode" in t.name)
        opened.clear()
        row = epoch(self, *args)
        problems.extend(images & set(opened))
        return row

    monkeypatch.setattr(builtins, "open", spy)
    monkeypatch.setattr(loop.Trainer, "_train_epoch", watched)
    config = TrainConfig(stages=2, epochs=1, epochs2=2, augment="flips", views=2, batch_size=32)
    adapter = AdaptConfig(rank=8, num_centers=4, mlp_ratio=1.0, input_size=(3, 32, 32))
    options = {"pretrained": False, "workers": 2}
    train(data, tmp_path / "run", "test_vit", config, adapter, **options)
    assert problems == []

    # What does not fit is streamed, with the same result.
    monkeypatch.setattr("fastadapt.data.images.available_memory", lambda: 0)
    monkeypatch.setattr(loop.Trainer, "_train_epoch", epoch)
    train(data, tmp_path / "streamed", "test_vit", replace(config), adapter, **options)
    one, other = (
        (tmp_path / name / "adapter.safetensors").read_bytes() for name in ("run", "streamed")
    )
    assert one == other
