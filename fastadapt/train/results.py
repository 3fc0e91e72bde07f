"""Write what a finished run says of its model: scores, predictions, and a summary."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from fastadapt.data.dataset import Dataset, Sample
from fastadapt.files import write_text
from fastadapt.train.metrics import scores


@dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        out: the run folder, for :func:`fastadapt.load_adapter` and ``fastadapt export``.
        best: the line of ``metrics.jsonl`` of the epoch that was kept.
        results: ``results.json``: metrics of the kept weights on ``val`` and ``test``.
    """

    out: Path
    best: dict[str, Any]
    results: dict[str, Any]


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
