from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadapt.bench.image_sets import ImageSet
from fastadapt.bench.suites.transfer import choices, table
from fastadapt.bench.transfer_recipes import BEST, DEFAULT, PROBE, RECIPES, best_recipe
from fastadapt.bench.transfer_runs import (
    MEMBER_SEED,
    Store,
    accuracies,
    measured,
    run_recipe,
    splits,
    write_csv,
)
from fastadapt.config import AdaptConfig
from fastadapt.data.dataset import read_dataset
from fastadapt.train.config import TrainConfig
from fastadapt.train.trials import Features, Trial


@pytest.fixture
def item(tmp_path):
    paths = [tmp_path / f"{i:02}.png" for i in range(80)]
    for path in paths:
        path.touch()
    labels = np.arange(80) % 2
    return ImageSet("set", 8, tuple(paths), labels, tuple(map(str, labels)), ("a, b", "c"))


def test_splits_are_stratified_and_differ_by_seed(item, tmp_path):
    first, other = splits(item, 0), splits(item, 1)
    assert [len(first[name]) for name in ("train", "val", "test")] == [51, 9, 20]
    assert not set(first["test"]) & set(first["train"]) | set(first["val"]) & set(first["test"])
    assert item.labels[first["test"]].sum() == 10
    assert not np.array_equal(first["test"], other["test"])
    write_csv(tmp_path / "data.csv", item, 0)
    found = read_dataset(tmp_path / "data.csv")
    assert found.classes == item.classes  # a comma in a name is no separator
    assert [Path(s.path).stem for s in found.split("test")] == [f"{i:02}" for i in first["test"]]


def test_tables_compare_splits_pairwise(tmp_path):
    store = Store(tmp_path / "runs.json")
    for seed, (probe, default) in enumerate([(0.80, 0.82), (0.84, 0.87)]):
        for method, value in ((PROBE, probe), (DEFAULT, default)):
            run = {"val": {"accuracy": value - 0.1}, "test": {"accuracy": value}}
            store.add(store.key("cells", "net", method, seed), run)
    runs = Store(tmp_path / "runs.json").runs  # what was run is read again
    assert accuracies(runs, "cells", "net", PROBE, "test") == {0: 0.80, 1: 0.84}
    (row,) = table(runs, [PROBE, DEFAULT])
    assert row[PROBE] == "82.0 ± 2.8" and row[DEFAULT] == "84.5 ± 3.5"
    # A mean of 2.5 with a standard error of 0.5, of two splits: Student's t of 12.7.
    assert row[f"{DEFAULT} − {PROBE}"] == "+2.5 (-3.9 to +8.9)"
    assert choices(runs)[1] == {"recipe": DEFAULT, "cells": "74.5 ± 3.5"}


def test_the_kept_epoch_is_validations():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    values = rng.normal(0, 1, (1, 40, 2, 8)).astype(np.float32)
    trial = Trial(
        Features(values, labels, ("a", "b"), torch.device("cpu")),
        TrainConfig(epochs=3, lr=1e-2, batch_size=8, select="loss"),
        AdaptConfig(rank=4, num_centers=2, mlp_ratio=0.5),
    )
    parts = {"train": np.arange(24), "val": np.arange(24, 32), "test": np.arange(32, 40)}
    seen = []
    for _ in trial.epochs(parts["train"], 5):
        logits = trial.predict(parts["val"])
        seen.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[24:32])))
    found = run_recipe(trial, parts, 5)
    assert found["epoch"] == int(torch.stack(seen).argmin()) + 1
    assert found["val"]["loss"] == pytest.approx(float(min(seen)))
    # A refit trains on both splits and chooses nothing; members have other seeds.
    trial.config = replace(trial.config, refit=True)
    again = run_recipe(trial, parts, 5, 2)
    beside = again["beside"]
    assert beside["no refit"]["test"] == found["test"]
    assert again["val"] == found["val"]
    one, other = (trial.run(np.arange(32), parts["test"], seed) for seed in (5, 5 + MEMBER_SEED))
    assert again["test"] == measured(one, labels[32:], ("a", "b"))
    both = measured((one + other) / 2, labels[32:], ("a", "b"))
    assert beside["2 seeds"] == {"test": both}


def test_recipes_are_settings_that_train_takes():
    assert RECIPES[DEFAULT].adapter.rank == 64
    for kind in BEST:
        recipe = best_recipe(kind)
        assert recipe.training.stages == 2 and recipe.training.refit and recipe.members == 3
