"""Train again on training and validation images: what is saved, what is reported, resuming."""

import csv
import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import fastadapt as fa
from fastadapt.data.dataset import read_dataset
from fastadapt.train import loop
from fastadapt.train.cross_validation import train_folds
from fastadapt.train.fold_settings import FoldSettings
from fastadapt.train.run import TrainConfig, train
from tests.helpers.imagesets import make_folders
from tests.helpers.shallow_models import SHALLOW_VIT

ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=1.0, input_size=(3, 48, 48))
QUICK = TrainConfig(epochs=3, lr=3e-3, batch_size=8, patience=2)
TWO_STAGES = replace(QUICK, stages=2, epochs=1, epochs2=1, lr2=1e-3, views=2, augment="dihedral")


def run(data, out, config, backbone=SHALLOW_VIT, **options):
    options = {"workers": 1, "save_every": 0, **options}
    return train(data, out, backbone, config, ADAPT, pretrained=False, **options).results


def weights(folder):
    return load_file(folder / "adapter.safetensors")


def predicted(folder, split):
    with (folder / "predictions.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def epochs(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_last_epoch_on_both_splits_is_saved_and_the_held_out_model_judged(
    tmp_path, monkeypatch
):
    data = tmp_path / "data"
    for split, count in (("train", 10), ("val", 5), ("test", 4)):
        make_folders(data / split, count, seed=count)
    before = run(data, tmp_path / "plain", QUICK)
    after = run(data, tmp_path / "refit", replace(QUICK, refit=True))
    # Validation judges the model that did not train on it; test images judge what is saved.
    assert after["val"] == before["val"] and after["linear_probe"] == before["linear_probe"]
    assert after["calibration"]["temperature"] == before["calibration"]["temperature"]
    assert after["best"]["epoch"] == before["best"]["epoch"]
    assert epochs(tmp_path / "plain") == epochs(tmp_path / "refit")
    assert predicted(tmp_path / "plain", "val") == predicted(tmp_path / "refit", "val")
    assert predicted(tmp_path / "plain", "test") != predicted(tmp_path / "refit", "test")
    assert after["refit"]["images"] == 45 and "refit" not in before
    held_out = after["refit"]["held_out_test"]
    assert held_out == {name: before["test"][name] for name in held_out}

    # The same weights from a table whose training split holds all of them, without a choice.
    both = read_dataset(data).split("train", "val")
    lines = [f"{s.path},{s.path.parent.name},train" for s in both]
    for sample in read_dataset(data).split("val"):
        copy = tmp_path / "copies" / sample.path.parent.name / sample.path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sample.path, copy)
        lines.append(f"{copy},{sample.path.parent.name},val")
    (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    monkeypatch.setattr(loop, "better", lambda *given: True)
    run(tmp_path / "all.csv", tmp_path / "all", replace(QUICK, patience=None))
    assert same(weights(tmp_path / "refit"), weights(tmp_path / "all"))
    assert not same(weights(tmp_path / "refit"), weights(tmp_path / "plain"))


def test_interrupted_refit_resumes_to_the_same(tmp_path, monkeypatch):
    data, config = make_folders(tmp_path / "data", 8), replace(TWO_STAGES, refit=True)
    whole = run(data, tmp_path / "whole", config, "test_efficientnet")
    assert [row["stage"] for row in epochs(tmp_path / "whole")] == [1, 2]
    save = loop.save_state
    for number, where in enumerate([(False, 2), (True, 1)]):  # refit or not, stage

        def saved(state, *args, where=where):
            save(state, *args)
            if (state.refit, state.stage) == where:
                signal.raise_signal(signal.SIGINT)

        out = tmp_path / f"run-{number}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop, "save_state", saved)
            run(data, out, config, "test_efficientnet")
        again = run(data, out, config, "test_efficientnet", resume=True)
        assert same(weights(out), weights(tmp_path / "whole"))
        assert epochs(out) == epochs(tmp_path / "whole")
        assert again["val"] == whole["val"]
        assert again["refit"] == whole["refit"]


def test_runs_of_several_seeds_refit_on_what_they_share(tmp_path):
    for split in ("train", "val", "test"):
        make_folders(tmp_path / "data" / split, 5, seed=len(split))
    found = []
    for refit in (False, True):
        result = train_folds(
            tmp_path / "data",
            tmp_path / f"runs-{refit}",
            SHALLOW_VIT,
            replace(QUICK, epochs=1, refit=refit, probe=False),
            ADAPT,
            FoldSettings(seeds=(0, 1)),
            pretrained=False,
            workers=1,
        )
        assert result.summary["ensemble"]["test"]["images"] == 15
        found.append(result.runs)
    for before, after in zip(*found, strict=True):
        assert predicted(before, "val") == predicted(after, "val")
        results = json.loads((after / "results.json").read_text())
        plain = json.loads((before / "results.json").read_text())["test"]
        assert results["refit"]["images"] == 30
        assert results["refit"]["held_out_test"]["loss"] == plain["loss"] != results["test"]["loss"]
