import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadapt.data.dataset import Dataset, Sample
from fastadapt.train.results import score_line, split_scores, write_predictions

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
