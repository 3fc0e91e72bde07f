import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadapt.data.dataset import Dataset, Sample
from fastadapt.decision import Decision
from fastadapt.train.metrics import calibration_error
from fastadapt.train.results import (
    TrainResult,
    calibration,
    probe_scores,
    score_line,
    softmax,
    split_scores,
    summary_table,
    write_predictions,
)
from fastadapt.train.sources import FeatureSource

DATASET = Dataset(
    classes=("crack", 'with "quotes", and comma'),
    samples=tuple(
        Sample(Path(f"/images/{index}.png"), index % 2, "val" if index < 4 else "test")
        for index in range(10)
    ),
)
LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])


def test_predictions_hold_every_image_once(tmp_path):
    logits = {"val": LOGITS, "test": torch.zeros(6, 2)}
    write_predictions(tmp_path / "predictions.csv", DATASET, logits)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [f"probability_{name}" for name in DATASET.classes]
    assert list(rows[0]) == ["path", "split", "target", "prediction", *columns]
    assert [row["path"] for row in rows] == [str(s.path) for s in DATASET.samples]
    assert [row["split"] for row in rows] == ["val"] * 4 + ["test"] * 6
    assert [row["target"] for row in rows] == [DATASET.classes[s.label] for s in DATASET.samples]
    first, second = DATASET.classes
    assert [row["prediction"] for row in rows[:4]] == [first, second, first, first]
    found = np.array([[float(row[c]) for c in columns] for row in rows[:4]])
    assert found == pytest.approx(torch.softmax(LOGITS, 1).numpy(), rel=1e-5)


def test_scores_of_a_split_and_their_line():
    found = split_scores(DATASET, "val", LOGITS, 0.5)
    assert found["loss"] == 0.5 and found["accuracy"] == 0.75 and found["images"] == 4
    assert found["confusion"] == [[2, 0], [1, 1]]
    low, high = (f"{value * 100:.1f}" for value in found["accuracy_interval"])
    line = score_line(found)
    assert f"accuracy 75.00% (95 % interval {low} to {high}), balanced 75.00%" in line
    assert line.endswith("macro-F1 0.7333, AUROC 1.0000 (4 images)")


def test_results_of_before_have_a_line():
    found = {"accuracy": 0.5, "macro_f1": 0.4, "images": 10}
    assert score_line(found) == "accuracy 50.00%, macro-F1 0.4000 (10 images)"


def features(splits, images=30):
    generator = torch.Generator().manual_seed(0)
    found = {}
    for split in splits:
        labels = np.arange(images) % 2
        tokens = torch.randn(1, images, 4, 8, generator=generator) + torch.from_numpy(
            labels
        ).float().view(1, -1, 1, 1)
        found[split] = FeatureSource(tokens.half(), labels, torch.device("cpu"))
    return found


def test_probe_is_fitted_to_cached_features_or_says_why_not(monkeypatch):
    found = probe_scores(features(("train", "val", "test")), DATASET.classes)
    assert found["test"]["accuracy"] > 0.8
    assert "test" not in probe_scores(features(("train", "val")), DATASET.classes)
    assert "it takes cached features" in probe_scores({}, DATASET.classes)
    monkeypatch.setattr("fastadapt.train.results.LARGEST", 30 * 8)
    line = probe_scores(features(("train", "val")), DATASET.classes)
    assert "30 images in 2 classes are too many" in line


def test_calibration_is_fitted_on_validation_and_measured_on_both():
    generator = torch.Generator().manual_seed(0)
    samples = tuple(
        Sample(Path(f"/{split}{index}.png"), index % 2, split)
        for split in ("test", "val")
        for index in range(200)
    )
    dataset = Dataset(DATASET.classes, samples)
    truth = torch.arange(200) % 2
    logits = {
        split: 6 * (torch.randn(200, 2, generator=generator) + 0.5 * torch.eye(2)[truth])
        for split in ("val", "test")
    }
    found = calibration(dataset, logits)
    assert found["temperature"] > 2  # it is far too sure
    for split in ("val", "test"):
        before, after = found[split]["ece_before"], found[split]["ece_after"]
        assert after < before / 2
        z = logits[split] / found["temperature"]
        assert after == calibration_error(truth.numpy(), softmax(z))
    broken = calibration(dataset, {"val": logits["val"] * torch.nan})
    assert broken == {
        "temperature": 1.0,
        "note": "the model's outputs hold NaN or infinite values",
        "val": {"ece_before": None, "ece_after": None},
    }
    assert calibration(dataset, logits, fit=False)["temperature"] == 1


def test_undecided_images_have_no_prediction_and_scores_of_their_own(tmp_path):
    decision = Decision("f1", 0.7, 0.5, (0.5, 0.8))  # the second class's: 0.12, 0.73, 0.05, 0.27
    found = split_scores(DATASET, "val", LOGITS, None, decision)
    assert found["confusion"] == [[2, 0], [1, 1]]
    assert found["likeliest_class"]["accuracy"] == 0.75
    assert found["decided"] == {
        "images": 3,
        "accuracy": pytest.approx(2 / 3),
        "balanced_accuracy": 0.5,
        "macro_f1": pytest.approx(0.4),
    }
    assert set(found["intervals"]) == {"accuracy", "balanced_accuracy", "macro_f1", "auroc"}
    assert sum(row["images"] for row in found["reliability"]) == 4
    write_predictions(tmp_path / "predictions.csv", DATASET, {"val": LOGITS}, decision)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == [
            "crack",
            "",
            "crack",
            "crack",
        ]


def test_summary_names_the_probe_beside_the_result(tmp_path):
    scored = {"accuracy": 0.5, "macro_f1": 0.4, "images": 10}
    results = {"val": scored, "test": scored, "linear_probe": {"val": scored, "test": scored}}
    results["calibration"] = {"temperature": 1.0, "note": "validation has 4 images"}
    results["decision"] = Decision("f1", 0.3).to_dict()
    table = summary_table(TrainResult(tmp_path, {"epoch": 3, "stage": 1}, results))
    names = list(table.columns[0].cells)
    named = ["kept", "val", "test", "linear probe, test", "temperature", "decision", "run"]
    assert names == named
