from dataclasses import replace

import pytest

import fastadapt as fa
from fastadapt.train import TrainConfig, train
from fastadapt.train.loop import Trainer
from tests.helpers.imagesets import make_folders

ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=1.0, input_size=(3, 48, 48))


@pytest.mark.parametrize(("select", "kept"), [("accuracy", 3), ("macro_f1", 1), ("loss", 5)])
def test_of_equal_epochs_that_of_the_lower_loss_is_kept(tmp_path, monkeypatch, select, kept):
    rows = [
        {"loss": 0.9, "accuracy": 0.50, "macro_f1": 0.8},
        {"loss": 0.8, "accuracy": 0.75, "macro_f1": 0.4},
        {"loss": 0.6, "accuracy": 0.75, "macro_f1": 0.4},
        {"loss": 0.7, "accuracy": 0.75, "macro_f1": 0.4},
        {"loss": 0.5, "accuracy": 0.50, "macro_f1": 0.4},
        {"loss": 0.5, "accuracy": 0.50, "macro_f1": 0.4},  # equal in all: the earlier one
    ]
    measured = iter(rows)
    monkeypatch.setattr(Trainer, "evaluate", lambda self, split: next(measured))
    data = make_folders(tmp_path / "data", 4)
    config = TrainConfig(epochs=len(rows), batch_size=8, val_fraction=0.25, probe=False)
    config = replace(config, select=select)
    out = tmp_path / "run"
    result = train(data, out, "test_vit", config, ADAPT, pretrained=False, workers=1)
    assert result.best["epoch"] == kept
