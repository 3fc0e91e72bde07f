"""Write what a finished run says of its model: scores, predictions, and a summary."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from fastadapt.data.dataset import Dataset, Sample
from fastadapt.files import write_text
from fastadapt.train.calibration import fit_temperature
from fastadapt.train.linear_probe import LARGEST, linear_probe
from fastadapt.train.metrics import calibration_error, scores
from fastadapt.train.sources import FeatureSource


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        out: the run folder, for :func:`fastadapt.load_adapter` and ``fastadapt export``.
        best: the line of ``metrics.jsonl`` of the epoch that was kept.
        results: ``results.json``: metrics of the kept weights on ``val`` and ``test``.
        trained: whether something was trained now; else the run was finished before.
    """

    out: Path
    best: dict[str, Any]
    results: dict[str, Any]
    trained: bool = True


def split_scores(
    dataset: Dataset, split: str, logits: Tensor, loss: float | None = None
) -> dict[str, Any]:
    """Return the loss and all metrics of a split.

    Args:
        dataset: the images.
        split: its name.
        logits: [N, K] of the split's images, in their order.
        loss: left out if None.
    """
    labels = np.array([sample.label for sample in dataset.split(split)])
    found = scores(labels, logits.argmax(1).numpy(), softmax(logits), dataset.classes)
    return found if loss is None else {"loss": loss, **found}


def probe_scores(
    features: Mapping[str, FeatureSource], classes: tuple[str, ...]
) -> dict[str, Any] | str:
    """Fit the linear probe to cached features, or return the line that says why there is none.

    Args:
        features: by split.
        classes: their names.
    """
    if "train" not in features:
        return "no linear probe beside the result: it takes cached features"
    images, channels = len(features["train"].labels), features["train"].features.shape[-1]
    if images * channels * len(classes) > LARGEST:
        return (
            f"no linear probe beside the result: {images} images in {len(classes)} classes are "
            "too many for it"
        )
    pooled = {split: source.pooled for split, source in features.items()}
    labels = {split: source.labels for split, source in features.items()}
    return linear_probe(pooled, labels, classes)


def calibration(dataset: Dataset, logits: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fit the temperature on validation; return it, and each split's ECE before and after it.

    Args:
        dataset: the images.
        logits: [N, K] by split, ``val`` among them.
    """
    labels = {
        split: np.array([sample.label for sample in dataset.split(split)]) for split in logits
    }
    temperature = fit_temperature(logits["val"], labels["val"])
    found: dict[str, Any] = {"temperature": temperature}
    for split, values in logits.items():
        finite = bool(values.isfinite().all())
        found[split] = {
            key: calibration_error(labels[split], softmax(z)) if finite else None
            for key, z in (("ece_before", values), ("ece_after", values / temperature))
        }
    return found


def softmax(logits: Tensor) -> np.ndarray:
    """Return probabilities [N, K] fp64."""
    return torch.softmax(logits.double(), 1).numpy()


def write_predictions(path: Path, dataset: Dataset, logits: dict[str, Tensor]) -> None:
    """Write a CSV of every image that was predicted: its class, the predicted one, probabilities.

    Args:
        path: of the CSV, written whole or not at all.
        dataset: the images.
        logits: [N, K] by split, in the order of the split's images.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"probability_{name}" for name in dataset.classes]
    writer.writerow(["path", "split", "target", "prediction", *columns])
    for split, values in logits.items():
        samples: Sequence[Sample] = dataset.split(split)
        rows = zip(samples, values.argmax(1).tolist(), softmax(values), strict=True)
        for sample, predicted, probabilities in rows:
            names = dataset.classes[sample.label], dataset.classes[predicted]
            writer.writerow([sample.path, split, *names, *(f"{p:.6g}" for p in probabilities)])
    write_text(path, text.getvalue())


def summary_table(result: TrainResult) -> Table:
    """Return the result as a table, for the terminal."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("kept", f"epoch {result.best['epoch']} of stage {result.best['stage']}")
    for split in ("val", "test"):
        if split in result.results:
            table.add_row(split, score_line(result.results[split]))
    probe = result.results.get("linear_probe", {})
    for split in ("test", "val"):
        if split in probe:
            table.add_row(f"linear probe, {split}", score_line(probe[split]))
            break
    table.add_row("run", str(result.out))
    return table


def score_line(found: dict[str, Any]) -> str:
    """Return the most telling scores of a split in one line.

    Args:
        found: as :func:`fastadapt.train.metrics.scores` gives them, or older runs have them.
    """
    accuracy = f"accuracy {found['accuracy']:.2%}"
    if found.get("accuracy_interval"):
        low, high = found["accuracy_interval"]
        accuracy += f" (95 % interval {low * 100:.1f} to {high * 100:.1f})"
    parts = [accuracy]
    if found.get("balanced_accuracy") is not None:
        parts.append(f"balanced {found['balanced_accuracy']:.2%}")
    parts.append(f"macro-F1 {found['macro_f1']:.4f}")
    if found.get("auroc") is not None:
        parts.append(f"AUROC {found['auroc']:.4f}")
    return f"{', '.join(parts)} ({found['images']} images)"
