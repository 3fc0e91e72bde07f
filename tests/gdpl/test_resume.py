"""Whatever ends a GDPL run, --resume gives bit for bit what an uninterrupted run gives."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import fastadapt as fa
from fastadapt import cli
from fastadapt.files import read_tensors, write_tensors
from fastadapt.gdpl import GDPLConfig, GDPLTrainConfig, train_gdpl
from fastadapt.gdpl.domain_features import FeatureTable
from fastadapt.gdpl.evaluate import Evaluator
from tests.helpers.gdpl_models import make_colours, save_source

NAMES = ("annual_crop", "forest", "harbour", "industrial_area", "river")
GDPL = GDPLConfig(depth=2, rank=2, rank_depth=2)
QUICK = GDPLTrainConfig(shots=3, epochs=3, lr=5e-3, val_fraction=0.4)
STEPS = 3  # 3 classes of 3 images in batches of 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tmp_path_factory.mktemp("gdpl") / "clip")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_colours(tmp_path_factory.mktemp("data") / "colours", NAMES)


def interrupt_at(patch, step):
    """Ctrl-C before a step of training, counted from 1 through all epochs and seeds."""
    from fastadapt.train.schedule import Schedule

    real, calls = Schedule.rate, []

    def rate(*args):
        calls.append(args)
        if len(calls) == step:
            raise KeyboardInterrupt
        return real(*args)

    patch.setattr(Schedule, "rate", rate)


def same_run(a, b):
    """Equal weights, bit for bit, equal losses and metrics."""
    first, _ = read_tensors(a / "adapter.safetensors")
    second, _ = read_tensors(b / "adapter.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    rows = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text]
        for text in ((folder / "metrics.jsonl").read_text().splitlines() for folder in (a, b))
    ]
    assert rows[0] == rows[1]
    results = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
    assert results[0] == results[1]
    assert not (a / "state.safetensors").exists() and not (b / "state.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "gdpl"),
    [
        ({}, {}),
        ({"augment": "none"}, {"noise": "always"}),
        ({"optimizer": "adamw", "clip_grad": 1.0, "augment": "flips"}, {"depth": 1}),
        ({"amp": "bf16", "augment": "none"}, {"rank": 0}),
    ],
    ids=lambda d: "-".join(map(str, d)) or "default",
)
def test_an_interrupted_epoch(source, data, tmp_path, monkeypatch, config, gdpl):
    config, gdpl = replace(QUICK, **config), replace(GDPL, **gdpl)
    whole, out = tmp_path / "whole", tmp_path / "run"
    train_gdpl(data, whole, source, config, gdpl)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, STEPS + 2)
        train_gdpl(data, out, source, config, gdpl)
    assert (out / "state.safetensors").is_file()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert not (out / "adapter.safetensors").exists()
    train_gdpl(data, out, source, config, gdpl, resume=True)
    same_run(out, whole)


def test_the_first_epoch_leaves_nothing(source, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        train_gdpl(data, out, source, QUICK, GDPL)
    assert not out.exists()
    with pytest.raises(fa.InputError, match="no run to resume"):
        train_gdpl(data, out, source, QUICK, GDPL, resume=True)


def test_an_interrupted_evaluation_trains_no_more(source, data, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    train_gdpl(data, whole, source, QUICK, GDPL)
    real = Evaluator.measure

    def measure(self, model, task, zero_shot=False):
        if task.name == "novel":
            raise KeyboardInterrupt
        return real(self, model, task, zero_shot)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Evaluator, "measure", measure)
        train_gdpl(data, out, source, QUICK, GDPL)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        train_gdpl(data, out, source, QUICK, GDPL, resume=True)
    same_run(out, whole)


def test_several_seeds(source, data, tmp_path, monkeypatch):
    config = replace(QUICK, augment="none")
    whole, out = tmp_path / "whole", tmp_path / "run"
    want = train_gdpl(data, whole, source, config, GDPL, seeds=(1, 2, 3))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, config.epochs * STEPS + STEPS + 2)
        train_gdpl(data, out, source, config, GDPL, seeds=(1, 2, 3))
    assert {path.name for path in out.iterdir()} == {"seed1", "seed2"}
    done = (out / "seed1" / "adapter.safetensors").stat().st_mtime_ns
    got = train_gdpl(data, out, source, config, GDPL, seeds=(1, 2, 3), resume=True)
    assert (out / "seed1" / "adapter.safetensors").stat().st_mtime_ns == done
    for seed in (1, 2, 3):
        same_run(out / f"seed{seed}", whole / f"seed{seed}")
    assert json.dumps(got) == json.dumps(want)


def test_other_settings_and_folders_are_refused(source, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, STEPS + 1)
        train_gdpl(data, out, source, QUICK, GDPL)
    with pytest.raises(fa.InputError, match="unfinished run: continue it with `resume=True`"):
        train_gdpl(data, out, source, QUICK, GDPL)
    with pytest.raises(fa.InputError, match=r"lr is 1.0, but was 0.005"):
        train_gdpl(data, out, source, replace(QUICK, lr=1.0), GDPL, resume=True)
    with pytest.raises(fa.InputError, match="holds the run of one seed"):
        train_gdpl(data, out, source, QUICK, GDPL, seeds=(1, 2), resume=True)
    with pytest.raises(fa.InputError, match="exclude each other"):
        train_gdpl(data, out, source, QUICK, GDPL, resume=True, overwrite=True)


def test_overwriting_leaves_nothing_to_resume_of_the_old_run(source, data, tmp_path, monkeypatch):
    out, config = tmp_path / "run", replace(QUICK, epochs=2)
    train_gdpl(data, out, source, config, GDPL, seeds=(1, 2))
    other = replace(config, lr=1e-3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 2)
        train_gdpl(data, out, source, other, GDPL, seeds=(1, 2), overwrite=True)
    assert (out / "seed2" / "results.json").is_file()  # the old run is whole
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, STEPS + 2)
        train_gdpl(data, out, source, other, GDPL, seeds=(1, 2), overwrite=True)
    assert not list(out.glob("**/results.json"))
    train_gdpl(data, out, source, other, GDPL, seeds=(1, 2), overwrite=True)
    assert len(list(out.glob("**/results.json"))) == 3
    (out / "results.json").unlink()
    results = train_gdpl(data, out, source, other, GDPL, seeds=(1, 2), resume=True)
    assert results["seeds"]["2"]["settings"]["lr"] == 1e-3


def test_ctrl_c_says_how_to_continue(source, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    args = ["fastadapt", "gdpl", data, "--out", out, "--clip", source.clip]
    args += ["--domain-encoder", source.domain_encoder, "--domain-size", 32, "--shots", 3]
    args += ["--domain-weights", source.domain_weights, "--prompt-depth", 2, "--epochs", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, args)))

    def command():
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, capsys.readouterr().err

    with monkeypatch.context() as patch:
        interrupt_at(patch, STEPS + 1)
        code, said = command()
    assert code == 130 and said.splitlines()[-1].endswith("--resume")
    sys.argv.append("--resume")
    assert command()[0] == 0
    assert (out / "results.json").is_file()


def test_features_that_were_computed_before(source, data, tmp_path, monkeypatch):
    """They train, resume, and belong to the settings."""
    source = replace(source, domain_encoder=7)
    vectors = {f"{name}/{i}.png": torch.randn(7) for name in NAMES for i in range(6)}
    write_tensors(tmp_path / "f.safetensors", vectors)
    table = FeatureTable.read(tmp_path / "f.safetensors")
    whole, out = tmp_path / "whole", tmp_path / "run"
    train_gdpl(data, whole, source, QUICK, GDPL, domain_features=table)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, STEPS + 1)
        train_gdpl(data, out, source, QUICK, GDPL, domain_features=table)
    vectors["forest/1.png"] = torch.zeros(7)
    write_tensors(tmp_path / "g.safetensors", vectors)
    other = FeatureTable.read(tmp_path / "g.safetensors")
    with pytest.raises(fa.InputError, match="domain_features is"):
        train_gdpl(data, out, source, QUICK, GDPL, domain_features=other, resume=True)
    train_gdpl(data, out, source, QUICK, GDPL, domain_features=table, resume=True)
    same_run(out, whole)


def test_killed_between_the_last_state_and_its_metrics(source, data, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    train_gdpl(data, whole, source, QUICK, GDPL)
    written = []

    def write_metrics(folder, history):
        written.append(history)
        if len(written) == QUICK.epochs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fastadapt.gdpl.train.write_metrics", write_metrics)
        train_gdpl(data, out, source, QUICK, GDPL)
    assert (out / "state.safetensors").exists()
    train_gdpl(data, out, source, QUICK, GDPL, resume=True)
    same_run(out, whole)
