"""What the field uses against small data, all at once: runs learn, resume, and are loaded again."""

import signal
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file

import fastadapt as fa
from fastadapt.errors import InputError
from fastadapt.train import TrainConfig
from tests.helpers.imagesets import make_folders
from tests.helpers.shallow_models import SHALLOW_VIT
from tests.train.test_run import interrupt_after, run, same_run

ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=1.0, input_size=(3, 32, 32))
EVERYTHING = TrainConfig(
    stages=2,
    epochs=2,
    epochs2=2,
    lr2=1e-3,
    batch_size=4,
    val_fraction=0.25,
    views=2,
    augment="dihedral",
    rotation=20,
    brightness=0.1,
    blur=1.0,
    erase=0.3,
    mixup=0.4,
    cutmix=1.0,
    ema=0.9,
    layer_decay=0.7,
    unfreeze_last=1,
    drop_last=True,
    probe=False,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("small") / "data", 7)


def backbone(name=SHALLOW_VIT, **options):
    torch.manual_seed(3)
    return timm.create_model(name, num_classes=0, **options)


@pytest.mark.parametrize("where", [(1, 1), (2, 1)])
def test_everything_at_once_resumes_to_the_same(tmp_path, data, monkeypatch, where):
    made = {"img_size": 32, "drop_path_rate": 0.2}
    dropping = replace(ADAPT, drop_path=0.2)
    whole = tmp_path / "whole"
    result = run(data, whole, EVERYTHING, dropping, backbone(SHALLOW_VIT, **made))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, *where, lambda: signal.raise_signal(signal.SIGINT))
        run(data, tmp_path / "run", EVERYTHING, dropping, backbone(SHALLOW_VIT, **made))
    again = tmp_path / "run"
    run(data, again, EVERYTHING, dropping, backbone(SHALLOW_VIT, **made), resume=True)
    same_run(whole, again)
    if result.best["stage"] == 2:
        held = {n for n in load_file(whole / "adapter.safetensors") if n.startswith("backbone.")}
        assert any("blocks.1." in name for name in held)
        assert not any("blocks.0." in name for name in held)
    fa.load_adapter(whole, backbone(SHALLOW_VIT, **made))


@pytest.mark.parametrize("last", [None, 1])
def test_full_training_needs_no_stage_1(tmp_path, data, last):
    config = TrainConfig(epochs=1, full=True, unfreeze_last=last, lr=1e-3, batch_size=8)
    plain = fa.AdaptConfig("none", pool="token", input_size=(3, 32, 32))
    start = backbone(img_size=32)
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    result = run(data, tmp_path / "run", replace(config, ema=0.5), plain, start)
    assert not (tmp_path / "run" / "cache").exists() and result.best["stage"] == 1
    saved = load_file(tmp_path / "run" / "adapter.safetensors")
    moved = {n for n, t in before.items() if not torch.equal(saved.get(f"backbone.{n}", t), t)}
    assert any(name.startswith("blocks.1.") for name in moved)
    assert any(name.startswith("blocks.0.") for name in moved) == (last is None)
    loaded = fa.load_adapter(tmp_path / "run", backbone(img_size=32))
    images = torch.randn(2, 3, 32, 32)
    tokens = loaded.backbone.forward_features(images)
    torch.testing.assert_close(loaded(images), loaded.head(tokens[:, 0]))


def test_the_average_is_what_is_kept(tmp_path, data):
    """With a decay of almost 0 per step the average is the weights; else it lags behind them."""
    config = TrainConfig(epochs=2, batch_size=4, val_fraction=0.25, probe=False)
    kept = {}
    for ema in (0.0, 1e-9, 0.9):
        out = tmp_path / str(ema)
        run(data, out, replace(config, ema=ema, select="loss"), ADAPT, backbone(img_size=32))
        kept[ema] = load_file(out / "adapter.safetensors")["head.weight"]
    torch.testing.assert_close(kept[0.0], kept[1e-9])
    assert not torch.allclose(kept[0.0], kept[0.9], atol=1e-4)


@pytest.mark.parametrize(
    ("config", "adapt", "says"),
    [
        ({"unfreeze_last": 2}, {}, "give `stages=2` or `full=True`"),
        ({"full": True, "stages": 2}, {}, "leave one of them out"),
        ({"full": True, "unfreeze_last": 99}, {}, "has 2 blocks"),
        ({"cutmix": 1.0}, {}, "`mixup=0.2`, which mixes features"),
        ({"rotation": 10.0}, {}, "give `views` of 2 or more"),
        ({"mixup": -1.0}, {}, "mixup is -1.0"),
        ({"ema": 1.0}, {}, "ema is 1.0"),
        ({"scale": 1.0}, {}, "scale is 1.0"),
        ({}, {"drop_path": 0.1}, "made without"),
        ({}, {"pool": "token"}, "give `adapter='none'`"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path, data, config, adapt, says):
    with pytest.raises(InputError, match=says):
        run(data, tmp_path / "run", TrainConfig(**config), replace(ADAPT, **adapt), backbone())
