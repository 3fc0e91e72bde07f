"""A GPU decodes plain JPEG files, processes all others: the same pixels, places and problems."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.io

from fastadapt.config import AdaptConfig
from fastadapt.data.dataset import Sample
from fastadapt.data.decode_pool import DecodePool, JpegFile, Reading
from fastadapt.data.decode_ring import DecodeRing
from fastadapt.data.gpu_decode import GpuDecoder
from fastadapt.data.images import ImageSource
from fastadapt.data.loader import ImageLoader
from fastadapt.data.nvjpeg import check_nvjpeg
from fastadapt.data.preprocess import Preprocess
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError
from fastadapt.train.config import TrainConfig
from fastadapt.train.run import train
from tests.helpers.imagesets import CLASSES, make_folders
from tests.helpers.jpegs import PLAIN, UNREADABLE, smooth, write_jpegs

CPU = torch.device("cpu")
PREPROCESS = Preprocess((3, 24, 24))
GEOMETRY = Geometry(24, 24, "bicubic", 0.875, "center")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return sorted(map(str, write_jpegs(tmp_path_factory.mktemp("jpegs")).iterdir()))


@pytest.fixture(scope="module")
def pool():
    with DecodePool(2) as pool:
        yield pool


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    """Let a CPU stand for the GPU."""
    for module in ("images", "decode_on"):
        monkeypatch.setattr(f"fastadapt.data.{module}.check_decode", lambda *_: None)
    monkeypatch.setattr("fastadapt.train.run.check_decode", lambda *_: None)


def name_of(path):
    return Path(path).name


def check_same(pool, paths, device, tolerance, value_range=None, batch=4):
    reading = Reading(GEOMETRY, value_range)
    plain, finish = DecodeRing(pool, reading, batch), GpuDecoder(reading, device)
    ring = DecodeRing(pool, finish.reading, batch)
    batches = [paths[i : i + batch] for i in range(0, len(paths), batch)]
    truth = [(plain.pixels(found).copy(), found.answers) for found in plain.batches(batches)]
    for names, (expected, problems), found in zip(
        batches, truth, ring.batches(batches), strict=True
    ):
        left = [i for i, answer in enumerate(found.answers) if isinstance(answer, JpegFile)]
        assert {name_of(names[i]) for i in left} == PLAIN & set(map(name_of, names))
        pixels, answers = finish(found)
        assert answers == problems
        bad = {name_of(names[i]) for i, answer in enumerate(answers) if answer}
        assert bad == UNREADABLE & set(map(name_of, names))
        good = [i for i, answer in enumerate(answers) if not answer]
        difference = pixels.cpu().numpy().astype(int) - expected
        assert pixels.device.type == device.type
        assert np.abs(difference[good]).max(initial=0) <= tolerance, names


def test_same_pixels_places_and_problems(pool, paths, monkeypatch):
    check_same(pool, paths, CPU, 2)
    check_same(pool, paths, CPU, 3, (5.0, 200.0), batch=16)
    monkeypatch.setattr("fastadapt.data.gpu_decode.AT_ONCE", 1)
    check_same(pool, paths, CPU, 2, batch=16)


@pytest.mark.gpu
def test_same_on_a_gpu(pool, paths):
    check_same(pool, paths, torch.device("cuda"), 6)
    check_same(pool, paths, torch.device("cuda"), 8, (5.0, 200.0), batch=16)


def test_what_is_refused_or_gone_costs_no_other_file(pool, paths, monkeypatch, tmp_path):
    decode, sizes = torchvision.io.decode_jpeg, []
    refused = (tmp_path / "refused.jpg", tmp_path / "refused and gone.jpg")
    for path in refused:
        smooth(20, 70, 50).save(path)
    length = refused[0].stat().st_size

    def decode_most(files, **options):
        if any(len(file) == length for file in files):
            raise RuntimeError("nvJPEG refuses one of them")
        sizes.append(len(files))
        return decode(files, **options)

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode_most)
    gone = tmp_path / "large.jpg"
    gone.write_bytes(Path(paths[-1]).read_bytes())
    finish = GpuDecoder(Reading(GEOMETRY), CPU)
    ring = DecodeRing(pool, finish.reading, 16)
    names = [*paths[:5], str(refused[0]), str(refused[1]), str(gone)]
    (found,) = ring.batches([names])
    refused[1].unlink()
    gone.unlink()
    pixels, answers = finish(found)
    assert answers[:6] == [None] * 6
    assert all("does not exist" in answer for answer in answers[6:])
    assert sum(sizes) == 5 > max(sizes)  # in parts, without those that are refused
    expected = np.asarray(GEOMETRY.apply(smooth(20, 70, 50)))
    assert np.abs(pixels[5].numpy().astype(int) - expected).max() <= 8  # of JPEG itself


def test_what_a_gpu_cannot_do_is_said(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="asks for lanczos"):
        GpuDecoder(Reading(Geometry(8, 8, "lanczos")), CPU)
    data = make_folders(tmp_path / "data", 4)
    config = TrainConfig(decode="gpu")
    with pytest.raises(InputError, match="this computes on a CPU: leave it out"):
        train(data, tmp_path / "run", "test_vit", config, pretrained=False, device="cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="this computes on a CPU: leave it out"):
        ImageLoader(data, PREPROCESS, 4, decode="gpu")

    def unable(*_, **__):
        raise RuntimeError("not compiled with nvJPEG\nat line 12")

    monkeypatch.setattr("torchvision.io.decode_jpeg", unable)
    with pytest.raises(InputError, match=r"on cpu \(not compiled with nvJPEG\): leave"):
        check_nvjpeg(CPU)


def check_batches(pool, paths, device, tolerance):
    samples = [Sample(Path(path), i % 2, "train") for i, path in enumerate(paths)]
    readable = [s for s in samples if s.path.name not in UNREADABLE]
    order = np.random.default_rng(0).permutation(len(readable))
    kinds = ({}, {"decode_on": "gpu"}, {"decode_on": "gpu", "resident": False})
    for augment, view in (("none", 0), ("crops", 3), ("dihedral", 2)):
        views, found = np.full(len(readable), view), []
        for kind in kinds:
            source = ImageSource(readable, PREPROCESS, device, 1, augment, pool=pool, **kind)
            found.append(list(source.batches(order, views, 4)))
        for (plain, expected), (kept, labels), (streamed, same) in zip(*found, strict=True):
            assert torch.equal(kept, streamed)
            assert torch.equal(expected, labels) and torch.equal(labels, same)
            assert kept.device.type == device.type
            assert kept.is_contiguous(memory_format=torch.channels_last)
            difference = (kept - plain).abs().max() * 255 * max(PREPROCESS.std)
            assert difference <= tolerance
    for kind in kinds[1:]:
        source = ImageSource(samples, PREPROCESS, device, 1, pool=pool, **kind)
        with pytest.raises(InputError, match="2 images cannot be read any more"):
            list(source.batches(np.arange(len(samples)), None, 16))


def test_kept_and_streamed_batches_are_the_same(pool, paths, cpu_as_gpu):
    check_batches(pool, paths, CPU, 3)


@pytest.mark.gpu
def test_batches_on_a_gpu(pool, paths):
    check_batches(pool, paths, torch.device("cuda"), 7)


def run_training(folder, decode, device):
    """Train for an epoch; return the cached features and the probabilities of the classes."""
    data, out = folder / "data", folder / decode
    if not data.exists():
        make_folders(data, 6, suffix=".jpg")
    adapter = AdaptConfig(rank=8, num_centers=4, mlp_ratio=1.0, input_size=(3, 32, 32))
    options = {"pretrained": False, "workers": 1, "device": device.type}
    config = TrainConfig(epochs=1, decode=decode, feature_dtype="fp32", amp="off", probe=False)
    train(data, out, "test_vit", config, adapter, **options)
    with pytest.raises(InputError, match="decode"):  # go on with other pixels
        other = replace(config, decode="cpu" if decode == "gpu" else "gpu")
        train(data, out, "test_vit", other, adapter, resume=True, **options)
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    probabilities = [[float(row[f"probability_{name}"]) for name in CLASSES] for row in rows]
    caches = sorted((out / "cache").glob("*.npy"), key=lambda path: path.stat().st_size)
    return np.load(caches[-1]), np.array(probabilities), {path.name for path in caches}


def test_training(tmp_path, cpu_as_gpu):
    features, probabilities, names = run_training(tmp_path, "gpu", CPU)
    assert np.isfinite(features).all() and len(probabilities) and len(names) == 2


@pytest.mark.gpu
def test_training_on_a_gpu(tmp_path):
    """The same classes but for near ties, and features alike."""
    device, tolerance = torch.device("cuda"), 0.1
    features, first, names = run_training(tmp_path, "cpu", device)
    others, second, other_names = run_training(tmp_path, "gpu", device)
    assert not names & other_names  # neither takes the other's features
    assert 0 < np.abs(features - others).mean() <= tolerance * np.abs(features).mean()
    assert np.abs(first - second).max() <= tolerance
    margin = np.diff(np.sort(first, 1)[:, -2:], axis=1)[:, 0]
    same = first.argmax(1) == second.argmax(1)
    assert (same | (margin <= 2 * tolerance)).all()
