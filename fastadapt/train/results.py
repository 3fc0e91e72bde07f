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
from fastadapt.decision import LIKELIEST, UNDECIDED, Decision
from fastadapt.errors import counted
from fastadapt.files import write_text
from fastadapt.train.calibration import calibrate
from fastadapt.train.intervals import bootstrap_intervals
from fastadapt.train.linear_probe import LARGEST, linear_probe
from fastadapt.train.metrics import calibration_error, scores
from fastadapt.train.sources import FeatureSource

NOT_ASKED = "not asked for"  # why a temperature is 1
DECIDED = ("accuracy", "balanced_accuracy", "macro_f1")  # of the images that are decided


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
    dataset: Dataset,
    split: str,
    logits: Tensor,
    loss: float | None = None,
    decision: Decision = LIKELIEST,
) -> dict[str, Any]:
    """Return the loss, all metrics of a split, and their bootstrap intervals.

    Args:
        dataset: the images.
        split: its name.
        logits: [N, K] of the split's images, in their order, calibrated.
        loss: left out if None.
        decision: how probabilities become classes. Images that it leaves undecided count in the
            metrics with the class that they would get; ``decided`` has those of the others.
    """
    samples = dataset.split(split)
    labels = np.array([sample.label for sample in samples])
    probabilities = softmax(logits)
    predictions = decision.classes(probabilities)
    found = scores(labels, predictions, probabilities, dataset.classes)
    clusters = [sample.group or str(sample.path) for sample in samples]
    found["intervals"] = bootstrap_intervals(labels, predictions, probabilities, clusters)
    if decision.threshold != 0.5:
        likelier = scores(labels, probabilities.argmax(1), probabilities, dataset.classes)
        found["likeliest_class"] = {name: likelier[name] for name in DECIDED}
    if decision.band is not None or decision.confidence is not None:
        kept = ~decision.undecided(probabilities)
        found["decided"] = {"images": int(kept.sum())}
        if kept.any():
            some = scores(labels[kept], predictions[kept], probabilities[kept], dataset.classes)
            found["decided"] |= {name: some[name] for name in DECIDED}
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
        return too_many_for_a_probe(images, len(classes))
    pooled = {split: source.pooled for split, source in features.items()}
    labels = {split: source.labels for split, source in features.items()}
    return linear_probe(pooled, labels, classes)


def too_many_for_a_probe(images: int, classes: int) -> str:
    """Return the line that says why there is no probe."""
    return (
        f"no linear probe beside the result: {images} images in {classes} classes are too many "
        "for it"
    )


def calibration(dataset: Dataset, logits: Mapping[str, Tensor], fit: bool = True) -> dict[str, Any]:
    """Fit the temperature on validation; return it, and each split's ECE before and after it.

    Args:
        dataset: the images.
        logits: [N, K] by split, ``val`` among them.
        fit: whether to fit it; else it is 1.

    Returns:
        For JSON. ``note`` says why the temperature is kept at 1, where it is.
    """
    labels = {
        split: np.array([sample.label for sample in dataset.split(split)]) for split in logits
    }
    temperature, note = 1.0, NOT_ASKED
    if fit:
        temperature, note = calibrate(logits["val"], labels["val"])
    found: dict[str, Any] = {"temperature": temperature}
    if note:
        found["note"] = note
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


def write_predictions(
    path: Path,
    dataset: Dataset,
    logits: dict[str, Tensor],
    decision: Decision = LIKELIEST,
) -> None:
    """Write a CSV of every image that was predicted: its class, the predicted one, probabilities.

    Args:
        path: of the CSV, written whole or not at all.
        dataset: the images.
        logits: [N, K] by split, in the order of the split's images.
        decision: how probabilities become classes; an undecided image has no prediction.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"probability_{name}" for name in dataset.classes]
    writer.writerow(["path", "split", "target", "prediction", *columns])
    for split, values in logits.items():
        samples: Sequence[Sample] = dataset.split(split)
        every = softmax(values)
        rows = zip(samples, decision.decide(every).tolist(), every, strict=True)
        for sample, predicted, probabilities in rows:
            name = "" if predicted == UNDECIDED else dataset.classes[predicted]
            names = dataset.classes[sample.label], name
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
    if "refit" in result.results:
        images = result.results["refit"]["images"]
        table.add_row(
            "saved", f"trained again on {counted(images, 'image')}; val is of the model before that"
        )
    probe = result.results.get("linear_probe", {})
    for split in ("test", "val"):
        if split in probe:
            table.add_row(f"linear probe, {split}", score_line(probe[split]))
            break
    calibrated = result.results.get("calibration", {})
    if calibrated.get("note"):
        table.add_row("temperature", f"1, since {calibrated['note']}")
    decision = Decision.from_dict(result.results.get("decision"), str(result.out))
    if not decision.plain:
        table.add_row("decision", str(decision))
    table.add_row("run", str(result.out))
    return table


def epoch_line(stage: str, row: dict[str, Any], kept: bool) -> str:
    """Return what an epoch gave in one line.

    Args:
        stage: its name.
        row: the line of ``metrics.jsonl``; without validation where a refit has none.
        kept: whether it is the best so far.
    """
    line = f"{stage}  epoch {row['epoch']:3d}  train loss {row['train_loss']:.4f}  "
    if "val_loss" not in row:
        return f"{line}{row['seconds']:.1f} s"
    return (
        f"{line}val loss {row['val_loss']:.4f}  accuracy {row['val_accuracy']:.2%}  "
        f"macro-F1 {row['val_macro_f1']:.4f}  {row['seconds']:.1f} s{'  *' if kept else ''}"
    )


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
    return f"{', '.join(parts)} ({counted(found['images'], 'image')})"
