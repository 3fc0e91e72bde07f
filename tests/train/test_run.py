import errno
import json
import math
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastadapt as fa
from fastadapt import cli
from fastadapt.data.dataset import read_dataset
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.train import loop as trainer
from fastadapt.train.run import TrainConfig, train
from tests.helpers import warm_process
from tests.helpers.imagesets import CLASSES, make_folders, truncate
from tests.helpers.shallow_models import SHALLOW_VIT

ADAPT = fa.AdaptConfig(rank=8, num_centers=4, mlp_ratio=1.0, input_size=(3, 48, 48))
QUICK = TrainConfig(epochs=3, lr=3e-3, batch_size=8, val_fraction=0.25)
OPTIONS = ["--no-pretrained", "--rank", "8", "--centers", "4", "--mlp-ratio", "1"]
OPTIONS += ["--image-size", "48", "--epochs", "2", "--batch-size", "8", "--save-every", "0"]


@pytest.fixture
def data(tmp_path):
    return make_folders(tmp_path / "data", 8)


def run(data, out, config=QUICK, adapt=ADAPT, backbone=SHALLOW_VIT, **options):
    options = {"workers": 1, "save_every": 0, **options}
    return train(data, out, backbone, config, adapt, pretrained=False, **options)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process; gives the exit code and stderr."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fastadapt", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, capsys.readouterr().err

    return call


@pytest.fixture
def refused(command, tmp_path):
    """Trains on bad input: one clear line, exit code 1, nothing left behind."""

    def call(data, message, *options, backbone="test_vit"):
        before = sorted(tmp_path.rglob("*"))
        args = ("--backbone", backbone, "--out", tmp_path / "run", *OPTIONS, *options)
        code, stderr = command("train", data, *args)
        assert code == 1, stderr
        assert stderr.startswith("fastadapt: ") and stderr.count("\n") == 1, stderr
        assert message in stderr, stderr
        assert sorted(tmp_path.rglob("*")) == before

    return call


def same_run(one, two):
    first, second = (load_file(folder / "adapter.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    histories = []
    for folder in (one, two):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        histories.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert histories[0] == histories[1]


def interrupt_after(monkeypatch, stage, epoch, action):
    """``action`` happens once this epoch's state is saved."""
    save = trainer.save_state

    def saved(state, *args):
        save(state, *args)
        if (state.stage, state.epoch) == (stage, epoch):
            action()

    monkeypatch.setattr(trainer, "save_state", saved)


def test_run_learns_and_leaves_a_whole_folder(tmp_path):
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        make_folders(tmp_path / "data" / split, count, seed=count)
    config = replace(QUICK, epochs=8, select="accuracy", augment="flips", views=2)
    result = run(tmp_path / "data", tmp_path / "run", config)
    assert result.results["test"]["accuracy"] > 0.8  # chance is a third
    for key in ("loss", "accuracy", "macro_f1"):
        assert result.results["val"][key] == result.best[f"val_{key}"]
    assert result.results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert result.results["test"]["auroc"] > 0.8 and result.results["test"]["images"] == 24
    assert len((tmp_path / "run" / "predictions.csv").read_text().splitlines()) == 1 + 48
    assert result.results["linear_probe"]["test"]["images"] == 24
    assert result.results["calibration"]["temperature"] > 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names - {"mistakes.png"} == {  # where there are none
        "config.json",
        "adapter.safetensors",
        "labels.txt",
        "splits.csv",
        "metrics.jsonl",
        "results.json",
        "predictions.csv",
        "curves.png",
        "evaluation.png",
        "cache",
    }
    rows = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert result.best == max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert set(rows[0]) == {"stage", "epoch", "lr", "train_loss", "val_loss", "val_accuracy"} | {
        "val_macro_f1",
        "seconds",
    }
    assert (tmp_path / "run" / "labels.txt").read_text().split() == list(CLASSES)
    assert read_dataset(tmp_path / "run" / "splits.csv") == read_dataset(tmp_path / "data")
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert min(picture.size) > 300

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    model = fa.load_adapter(tmp_path / "run")
    preprocess = Preprocess.from_dict(config["preprocess"])
    samples = read_dataset(tmp_path / "data").split("test")
    images = torch.stack([preprocess.read(sample.path) for sample in samples])
    with torch.no_grad():
        predicted = model(preprocess.normalize(images)).argmax(1)
    right = (predicted == torch.tensor([s.label for s in samples])).float().mean().item()
    assert right == pytest.approx(result.results["test"]["accuracy"], abs=1 / len(samples))


@pytest.mark.parametrize("backbone", ["test_efficientnet", SHALLOW_VIT])
def test_second_stage_trains_the_backbone(tmp_path, data, backbone):
    config = replace(QUICK, stages=2, epochs=2, epochs2=2, select="loss", lr2=1e-3)
    result = run(data, tmp_path / "two", config, backbone=backbone)
    run(data, tmp_path / "one", replace(config, stages=1), backbone=backbone)
    tensors = [load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two")]
    backbone_names = [name for name in tensors[0] if name.startswith("backbone.")]
    assert backbone_names
    moved = any(not torch.equal(tensors[0][n], tensors[1][n]) for n in backbone_names)
    assert moved == (result.best["stage"] == 2)
    rows = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["stage"] for row in rows] == [1, 1, 2, 2]
    fa.load_adapter(tmp_path / "two")


def test_nothing_is_computed_while_kernels_compile(tmp_path, data, monkeypatch):
    module, compiled = sys.modules[train.__module__], threading.Event()

    def begin(model, config, device, dtype, cached):
        assert isinstance(model, fa.AdaptedModel) and config.stages == 2 and cached
        thread = threading.Timer(0.1, compiled.set)
        thread.start()
        return thread

    monkeypatch.setattr(module, "begin_kernels", begin)
    monkeypatch.setattr(module, "run_prepared", lambda *given: compiled.is_set())
    assert run(data, tmp_path / "run", replace(QUICK, stages=2)) is True


def test_without_cache_and_with_lora(tmp_path, data):
    run(data, tmp_path / "fresh", replace(QUICK, epochs=1, cache=False, augment="crops"))
    lora = replace(ADAPT, lora=fa.LoRAConfig(r=2, dropout=0.1))
    run(data, tmp_path / "lora", replace(QUICK, epochs=1), lora)
    for name in ("fresh", "lora"):
        assert not (tmp_path / name / "cache").exists()
    tensors = load_file(tmp_path / "lora" / "adapter.safetensors")
    assert any(name.endswith("lora_B.q") or ".lora_B." in name for name in tensors)
    assert all(t.any() for name, t in tensors.items() if ".lora_B." in name)


def test_every_option_trains(tmp_path, data):
    config = TrainConfig(
        epochs=2,
        optimizer="adam",
        class_weights="balanced",
        label_smoothing=0.1,
        clip_grad=1.0,
        amp="bf16",
        patience=1,
        feature_dtype="fp32",
        batch_size=1000,
    )
    result = run(data, tmp_path / "run", config, fa.AdaptConfig("none", input_size=(3, 48, 48)))
    assert math.isfinite(result.best["val_loss"])


def test_patience_ends_a_stage_and_the_earlier_of_equals_is_kept(tmp_path, data):
    config = replace(QUICK, epochs=30, lr=1e-12, patience=2)
    result = run(data, tmp_path / "run", config)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert result.best["epoch"] == 1
    assert len(rows) == 3


# Resuming: whatever ends a run, --resume gives bit for bit what an uninterrupted run gives.
TWO_STAGES = replace(
    QUICK, stages=2, epochs=3, epochs2=2, lr2=1e-3, views=2, augment="dihedral", clip_grad=1.0
)
DROPOUT = replace(ADAPT, proj_drop=0.2)


@pytest.mark.parametrize("where", [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_interrupted_run_resumes_to_the_same(tmp_path, data, monkeypatch, where):
    whole = tmp_path / "whole"
    run(data, whole, TWO_STAGES, DROPOUT, backbone="test_efficientnet")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, *where, lambda: signal.raise_signal(signal.SIGINT))
        run(data, tmp_path / "run", TWO_STAGES, DROPOUT, backbone="test_efficientnet")
    assert (tmp_path / "run" / "state.safetensors").is_file()
    run(data, tmp_path / "run", TWO_STAGES, DROPOUT, backbone="test_efficientnet", resume=True)
    same_run(whole, tmp_path / "run")


KILLED_WHILE_WRITING = """
import os, signal, sys, torch
torch.set_num_threads(1)
import fastadapt.files
from tests.train.test_run import *
calls = 0
sync = os.fsync
def fsync(handle):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)
fastadapt.files.os.fsync = fsync
run(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("write", [2, 7])  # the second cache file; the state after epoch 3
def test_killed_run_resumes_to_the_same(tmp_path, data, write):
    run(data, tmp_path / "whole")
    args = [str(data), str(tmp_path / "run"), str(write)]
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, *args]
    with (tmp_path / "log").open("w") as log:
        killed = warm_process.run(
            command, stdout=log, stderr=log, env=os.environ, check=False, timeout=500
        )
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "run").rglob(".*.tmp"))
    run(data, tmp_path / "run", resume=True)
    assert not list((tmp_path / "run").rglob(".*.tmp"))
    same_run(tmp_path / "whole", tmp_path / "run")


def test_ctrl_c_says_how_to_go_on(tmp_path, data, command, monkeypatch):
    args = ("train", data, "--backbone", "test_vit", "--out", tmp_path / "run", *OPTIONS)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, 1, lambda: signal.raise_signal(signal.SIGINT))
        code, stderr = command(*args)
    assert code == 130
    assert stderr.splitlines()[-1].endswith("--resume")
    assert "Traceback" not in stderr
    code, stderr = command(*args)
    assert code == 1 and "unfinished run: continue it with --resume" in stderr
    code, stderr = command(*args, "--resume", "--lr", "0.5")
    assert code == 1 and "lr is 0.5, but was 0.001" in stderr
    shutil.copy(data / CLASSES[0] / "00.png", data / CLASSES[0] / "new.png")
    code, stderr = command(*args, "--resume")
    assert code == 1 and "data set" in stderr
    code, stderr = command(*args, "--overwrite")
    assert code == 0, stderr
    code, stderr = command(*args, "--resume")
    assert code == 0 and "finished already" in stderr


def test_overwriting_keeps_the_old_run_until_the_new_one_has_a_result(tmp_path, data, monkeypatch):
    out = tmp_path / "run"
    run(data, out)
    old = (out / "adapter.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        run(data, out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1, 1, lambda: signal.raise_signal(signal.SIGINT))
        run(data, out, replace(QUICK, seed=1), overwrite=True)
    assert (out / "adapter.safetensors").read_bytes() == old
    run(data, out, replace(QUICK, seed=1), resume=True)
    assert (out / "adapter.safetensors").read_bytes() != old


def test_only_features_in_use_stay_in_the_cache(tmp_path, data):
    run(data, tmp_path / "run")
    first = {path.name for path in (tmp_path / "run" / "cache").iterdir()}
    run(data, tmp_path / "run", replace(QUICK, feature_dtype="fp32"), overwrite=True)
    second = {path.name for path in (tmp_path / "run" / "cache").iterdir()}
    assert len(first) == len(second) == 2
    assert not first & second


def test_full_disk_keeps_the_epoch_before(tmp_path, data, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    run(data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"disk .* is full"):
        interrupt_after(patch, 1, 1, lambda: patch.setattr("fastadapt.files.os.fsync", full))
        run(data, tmp_path / "run")
    run(data, tmp_path / "run", resume=True)
    same_run(tmp_path / "whole", tmp_path / "run")


def test_diverged_training_stops(tmp_path, data, monkeypatch):
    def poison():
        with torch.no_grad():
            model.head.weight.fill_(math.nan)

    model = None
    make = trainer.make_optimizer

    def spy(adapted, config):
        nonlocal model
        model = adapted
        return make(adapted, config)

    monkeypatch.setattr(trainer, "make_optimizer", spy)
    interrupt_after(monkeypatch, 1, 1, poison)
    with pytest.raises(InputError, match=r"loss is nan in stage 1, epoch 2, step 1 of .*`clip_g"):
        run(data, tmp_path / "run")
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert all(torch.isfinite(t).all() for t in state.values())


def test_odd_images_train(tmp_path, data):
    Image.new("L", (300, 20)).save(data / CLASSES[0] / "gray.png")
    Image.new("RGBA", (5, 90)).save(data / CLASSES[0] / "alpha.png")
    Image.fromarray(np.full((30, 30), 40000, np.uint16)).save(data / CLASSES[1] / "deep.tif")
    result = run(data, tmp_path / "run", replace(QUICK, epochs=1, augment="crops", views=2))
    assert result.best["epoch"] == 1


def test_unreadable_images(tmp_path, data, refused, command):
    truncate(data / CLASSES[0] / "00.png")
    (data / CLASSES[1] / "01.png").write_text("no image")
    refused(data, "2 of 24 images cannot be read")
    refused(data, "--skip-unreadable")
    args = ("train", data, "--backbone", "test_vit", "--out", tmp_path / "run", *OPTIONS)
    code, stderr = command(*args, "--skip-unreadable")
    assert code == 0, stderr
    assert "left out: 2 of 24" in stderr
    assert len((tmp_path / "run" / "splits.csv").read_text().splitlines()) == 1 + 22


def test_bad_data_sets(tmp_path, data, refused):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no folders")
    refused(tmp_path / "nowhere", "does not exist")
    make_folders(tmp_path / "one", 3, CLASSES[:1])
    refused(tmp_path / "one", "one class only")
    (tmp_path / "data.csv").write_text("path,label\na.png,x\nb.png,y\n")
    refused(tmp_path / "data.csv", "2 files that do not exist")


def test_bad_options(tmp_path, data, refused):
    refused(data, "Nearest: test_vit", backbone="test_vitt")
    refused(data, "finds no GPU" if not torch.cuda.is_available() else "", "--device", "cuda:99")
    refused(data, "expected auto, cpu", "--device", "tpu")
    refused(data, "epochs is 0", "--epochs", "0")
    refused(data, "lr is -1.0", "--lr", "-1")
    refused(data, "stages is 3", "--stages", "3")
    refused(data, "--val-fraction is 1.5", "--val-fraction", "1.5")
    refused(data, "--views of 2 or more", "--augment", "flips")
    refused(data, "--augment flips", "--views", "3")
    refused(data, "leave --views out", "--augment", "flips", "--views", "3", "--no-cache")
    refused(data, "amp is 'fp16'", "--amp", "fp16", "--device", "cpu")
    refused(data, "letters q, k, v", "--lora-rank", "2", "--lora-parts", "xy")
    refused(data, "--crop-pct is 3.0", "--crop-pct", "3")
    refused(data, "no run to resume", "--resume")
    refused(data, "exclude each other", "--resume", "--overwrite")
    with pytest.raises(InputError, match="select is 'f1'"):
        TrainConfig(select="f1")


def test_bad_weights(tmp_path, data, refused):
    import timm

    state = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=48).state_dict()
    save_file(state, tmp_path / "cut.safetensors")
    truncate(tmp_path / "cut.safetensors")
    refused(data, "truncated", "--weights", tmp_path / "cut.safetensors")
    state["norm.bias"][0] = math.nan
    save_file(state, tmp_path / "nan.safetensors")
    refused(data, "norm.bias holds 1 value that is", "--weights", tmp_path / "nan.safetensors")
    torch.save({"code": os.system}, tmp_path / "code.pth")
    refused(data, "could run code", "--weights", tmp_path / "code.pth")
    refused(data, "does not exist", "--weights", tmp_path / "gone.pth")


def test_weights_that_cannot_be_fetched(tmp_path, data, command):
    out = tmp_path / "run"
    code, stderr = command("train", data, "--backbone", "test_vit", "--out", out)
    assert code == 1 and "--weights" in stderr and stderr.count("\n") == 1
    assert not out.exists()


def test_folders_of_others_are_left_alone(tmp_path, data, refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    refused(data, "holds other files, 'thesis.tex'")
    refused(data, "holds other files, 'thesis.tex'", "--overwrite")
