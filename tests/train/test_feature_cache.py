import errno
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import fastadapt as fa
from fastadapt.data.dataset import read_dataset
from fastadapt.data.images import ImageSource
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.fusion import frozen_blocks as frozen
from fastadapt.progress import progress_bars
from fastadapt.train import feature_cache as features
from fastadapt.train.feature_cache import CacheSettings, cache_key, cached_source
from fastadapt.train.sources import logits_of
from tests.helpers.imagesets import make_folders

CPU = torch.device("cpu")
SETTINGS = CacheSettings(views=2, augment="flips", dtype="fp32")


def make_model(name="test_vit", **config):
    torch.manual_seed(0)
    config = fa.AdaptConfig(**{"rank": 8, "num_centers": 4, "input_size": (3, 64, 64), **config})
    return fa.adapt(name, config, 3, pretrained=False)


@pytest.fixture
def images(tmp_path):
    dataset = read_dataset(make_folders(tmp_path / "data", 4))
    preprocess = Preprocess((3, 64, 64), crop_pct=1.0)
    return ImageSource(dataset.split("train"), preprocess, CPU, 1, "flips")


def make_source(model, images, folder, settings=SETTINGS):
    with progress_bars(quiet=True) as progress:
        return cached_source(model, images, folder, settings, progress, nullcontext)


def replaced(images, **changes):
    values = {"samples": images.samples, "preprocess": images.preprocess} | changes
    return ImageSource(device=CPU, workers=1, augment="flips", **values)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "swin"])
@pytest.mark.parametrize("adapter", ["cladapter", "none"])
def test_cached_features_equal_recomputed_ones(tmp_path, images, name, adapter):
    if name == "swin":
        import timm

        swin = {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1)}
        backbone = timm.models.SwinTransformer(**swin, num_heads=(1, 2), num_classes=0)
        config = fa.AdaptConfig(adapter, rank=8, num_centers=4, input_size=(3, 64, 64))
        model = fa.adapt(backbone, config, 3).eval()
        assert model.spec.layout == "channels_last"
    else:
        model = make_model(name, adapter=adapter).eval()
    source = make_source(model, images, tmp_path / "cache")
    order = np.array([5, 0, 3])
    for view in (0, 1):
        views = np.full(len(images.labels), view)
        (cached, labels), (fresh, expected) = (
            next(s.batches(order, views, batch_size=8)) for s in (source, images)
        )
        assert torch.equal(labels, expected)
        with torch.no_grad():
            torch.testing.assert_close(
                logits_of(model, source, cached),
                logits_of(model, images, fresh),
                rtol=1e-4,
                atol=1e-5,
            )


def test_pooled_features_are_the_means_of_the_plain_view(tmp_path, images, monkeypatch):
    model = make_model("test_efficientnet").eval()
    source = make_source(model, images, tmp_path / "cache")
    monkeypatch.setattr("fastadapt.train.sources.POOLED_AT_ONCE", 4)
    expected = np.array(source.features[0], np.float32).mean(1)
    assert source.pooled.dtype == np.float32
    np.testing.assert_allclose(source.pooled, expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_kept_of_a_backbone_that_is_not_called_again(tmp_path, images, monkeypatch):
    monkeypatch.setattr(frozen, "is_covered", lambda images: True)
    model, called = make_model("test_vit"), []
    kept = frozen.BlockCache.calls

    def counted(self, dtype):
        called.append(kept(self, dtype))
        return called[-1]

    monkeypatch.setattr(frozen.BlockCache, "calls", counted)
    with progress_bars(quiet=True) as progress:
        autocast = partial(torch.autocast, "cpu", torch.bfloat16)
        cached_source(model, images, tmp_path / "cache", SETTINGS, progress, autocast)
    assert called[0] and model.backbone not in frozen.caches


def test_cache_is_used_and_safe_to_delete(tmp_path, images, monkeypatch):
    model, folder = make_model(), tmp_path / "cache"
    first = np.array(make_source(model, images, folder).features)
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    make_source(model, images, folder)
    assert file.stat().st_mtime_ns == written
    file.unlink()
    assert np.array_equal(make_source(model, images, folder).features, first)


def test_damaged_cache_is_recomputed(tmp_path, images):
    model, folder = make_model(), tmp_path / "cache"
    first = np.array(make_source(model, images, folder).features)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    zeroed = whole[:1000] + bytes(len(whole) - 1032) + whole[-32:]
    for content in (whole[:-100], whole[:-1], zeroed, b"", b"no array"):
        file.write_bytes(content)
        assert np.array_equal(make_source(model, images, folder).features, first)


def test_key_depends_on_every_ingredient(images):
    model = make_model()
    sample = images.samples[0]
    keys = [cache_key(model, images, SETTINGS), cache_key(model, images, CacheSettings())]
    for change in ({"views": 3}, {"augment": "crops"}, {"seed": 1}, {"dtype": "fp16"}):
        keys.append(cache_key(model, images, replace(SETTINGS, **change)))
    keys.append(cache_key(model, images, replace(SETTINGS, amp="torch.bfloat16")))
    for change in ({"crop_pct": 0.9}, {"interpolation": "bilinear"}, {"std": (1.0, 1.0, 1.0)}):
        other = replaced(images, preprocess=replace(images.preprocess, **change))
        keys.append(cache_key(model, other, SETTINGS))
    keys.append(cache_key(model, replaced(images, samples=images.samples[1:]), SETTINGS))
    keys.append(cache_key(model, replaced(images, samples=images.samples[::-1]), SETTINGS))
    keys.append(cache_key(make_model(adapter="none"), images, SETTINGS))
    keys.append(cache_key(make_model(features="forward_features"), images, SETTINGS))
    for factor in (1, 2):  # functions of one name
        own = make_model(features=lambda net, x, f=factor: f * net.forward_features(x))
        keys.append(cache_key(own, images, SETTINGS))
    os.utime(sample.path, ns=(1, 1))
    keys.append(cache_key(model, images, SETTINGS))
    sample.path.write_bytes(images.samples[1].path.read_bytes() + b" ")
    os.utime(sample.path, ns=(1, 1))
    keys.append(cache_key(model, images, SETTINGS))
    with torch.no_grad():
        next(model.backbone.parameters()).flatten()[0] += 1
    keys.append(cache_key(model, images, SETTINGS))
    assert len(set(keys)) == len(keys)
    with torch.no_grad():  # what stands behind the backbone is no ingredient
        model.head.weight += 1
    assert cache_key(model, images, SETTINGS) == keys[-1]


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, np.float16), (1e6, np.float32)])
def test_fp16_only_where_it_holds_every_value(tmp_path, images, scale, dtype):
    model = make_model()
    with torch.no_grad():
        model.backbone.norm.weight.mul_(scale)
    source = make_source(model, images, tmp_path / "cache", CacheSettings())
    assert source.features.dtype == dtype
    assert np.isfinite(source.features).all()
    if scale > 1:
        with pytest.raises(InputError, match="`feature_dtype='fp32'`"):
            make_source(model, images, tmp_path / "cache", CacheSettings(dtype="fp16"))


def test_features_that_are_not_finite_name_the_image(tmp_path, images):
    model = make_model()
    with torch.no_grad():
        model.backbone.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=images.samples[0].path.name):
        make_source(model, images, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_too_small_a_disk_is_refused_before_work(tmp_path, images, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match=r"need .* MiB, but .* `cache=False`"):
        make_source(make_model(), images, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_full_disk_leaves_nothing(tmp_path, images, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastadapt.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make_source(make_model(), images, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
