"""Pictures of a training run: curves and confusion matrices.

Figures are made without pyplot: no global state, no window system.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastadapt.files import atomic_path

MOST_CURVES = 8  # of classes against the rest, in one picture


def plot_curves(
    history: Sequence[dict[str, Any]], path: str | os.PathLike, best: int | None = None
) -> None:
    """Draw loss on the left, validation accuracy and macro-F1 on the right, over epochs.

    Args:
        history: the lines of ``metrics.jsonl``.
        path: of the PNG, written whole or not at all.
        best: index of the epoch that was kept; marked if given.
    """
    figure = Figure(figsize=(10, 4), dpi=120)  # a constrained layout draws everything twice
    loss, score = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.99, bottom=0.12, top=0.97, wspace=0.2)
    draw_curves(loss, score, history, best)
    save_figure(figure, path)


def plot_confusion(
    confusion: Sequence[Sequence[int]],
    classes: Sequence[str],
    path: str | os.PathLike,
    title: str = "",
) -> None:
    """Write a confusion matrix as a PNG; arguments as for :func:`draw_confusion`."""
    size = min(max(4.0, 1.5 + 0.6 * len(classes)), 20.0)
    figure = Figure(figsize=(size + 1, size), dpi=120, layout="constrained")
    draw_confusion(figure.subplots(), confusion, classes, title)
    save_figure(figure, path)


def plot_evaluation(
    path: str | os.PathLike,
    split: str,
    found: dict[str, Any],
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Write confusion matrix, ROC curves and reliability diagram side by side as a PNG.

    Args:
        path: of the PNG.
        split: what was judged, for the title.
        found: its scores.
        labels: [N] true class indices.
        probabilities: [N, K].
        classes: K names.
    """
    size = min(max(4.0, 1.5 + 0.45 * len(classes)), 14.0)
    figure = Figure(figsize=(size + 9.5, size), dpi=100)
    widths = (size + 0.8, 4, 4)
    matrix, roc, reliability = figure.subplots(1, 3, gridspec_kw={"width_ratios": widths})
    title = f"{split}: {found['accuracy']:.1%} of {found['images']} right"
    draw_confusion(matrix, found["confusion"], classes, title)
    draw_roc(roc, labels, probabilities, classes)
    draw_reliability(reliability, found)
    figure.subplots_adjust(wspace=0.3)
    save_figure(figure, path, tight=True)


def draw_roc(
    axes: Axes, labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> None:
    """Draw the ROC curve of the second of two classes, or of each class against the rest.

    Args:
        axes: to draw on.
        labels: [N] true class indices.
        probabilities: [N, K].
        classes: K names; of more than :data:`MOST_CURVES`, the worst are drawn.
    """
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    curves = []
    for index in [1] if len(classes) == 2 else range(len(classes)):
        positive = labels == index
        if not 0 < positive.sum() < len(labels) or not np.isfinite(probabilities).all():
            continue
        order = np.argsort(-probabilities[:, index], kind="stable")
        last = np.flatnonzero(np.diff(probabilities[order, index], append=-1.0))  # of equal ones
        hits, wrong = np.cumsum(positive[order])[last], np.cumsum(~positive[order])[last]
        rates = [np.concatenate([[0], x / x[-1]]) for x in (wrong, hits)]
        curves.append((float(np.trapezoid(rates[1], rates[0])), classes[index], rates))
    for area, name, (wrong, hits) in sorted(curves, key=lambda curve: curve[0])[:MOST_CURVES]:
        axes.plot(wrong, hits, label=f"{name} ({area:.3f})")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC (AUROC)")
    axes.set_aspect("equal")
    if curves:
        axes.legend(loc="lower right", fontsize="small")


def draw_reliability(axes: Axes, found: dict[str, Any]) -> None:
    """Draw accuracy over confidence, and how many images each bin has.

    Args:
        axes: to draw on.
        found: scores, with ``reliability`` and ``ece``.
    """
    rows = found.get("reliability") or []
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    x = [row["confidence"] for row in rows]
    total = sum(row["images"] for row in rows) or 1
    axes.bar(x, [row["images"] / total for row in rows], width=0.03, color="0.85", label="images")
    axes.plot(x, [row["accuracy"] for row in rows], marker="o", label="accuracy")
    error = "" if found.get("ece") is None else f" (ECE {found['ece']:.3f})"
    axes.set(xlabel="confidence", ylabel="accuracy, share of images", title=f"reliability{error}")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    axes.set_aspect("equal")
    axes.legend(loc="upper left", fontsize="small")


def draw_curves(
    loss: Axes, score: Axes, history: Sequence[dict[str, Any]], best: int | None = None
) -> None:
    """Draw losses on one axes, validation accuracy and macro-F1 on another.

    Args:
        loss, score: axes to draw on.
        history: the lines of ``metrics.jsonl``.
        best: index of the epoch that was kept; marked if given.
    """
    epochs = np.arange(1, len(history) + 1)
    marker = "o" if len(history) <= 30 else None
    for axes, keys in (
        (loss, {"train_loss": "training", "val_loss": "validation"}),
        (score, {"val_accuracy": "accuracy", "val_macro_f1": "macro-F1"}),
    ):
        for key, label in keys.items():
            values = [row[key] for row in history]
            axes.plot(epochs, values, label=label, marker=marker, markersize=3)
        for first in [i for i in range(1, len(history)) if _stage_begins(history, i)]:
            axes.axvline(first + 0.5, color="0.5", linestyle="--", linewidth=1)
            axes.annotate(
                f" stage {history[first]['stage']}",
                (first + 0.5, 0.95),
                xycoords=("data", "axes fraction"),
                color="0.4",
            )
        if best is not None:
            axes.axvline(best + 1, color="tab:green", linewidth=1, alpha=0.6, label="kept epoch")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_ylabel("loss")
    score.set_ylabel("validation score")


def draw_confusion(
    axes: Axes, confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str = ""
) -> None:
    """Draw a confusion matrix: counts, coloured by the share of the true class.

    Args:
        axes: to draw on.
        confusion: [K, K], true class in rows, predicted class in columns.
        classes: K names.
        title: above the picture.
    """
    counts = np.asarray(confusion)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.figure.colorbar(image, ax=axes, label="share of the true class")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(classes) > 20:
        return  # the numbers would not be legible
    for row, column in np.ndindex(*counts.shape):
        color = "white" if share[row, column] > 0.5 else "black"
        number = str(counts[row, column])
        axes.text(column, row, number, ha="center", va="center", color=color)


def save_figure(figure: Figure, path: str | os.PathLike, tight: bool = False) -> None:
    """Write a PNG, whole or not at all; ``tight``, without empty margins."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # Letters that the font lacks are boxes in the picture; the files beside it have the names.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format="png", bbox_inches="tight" if tight else None)


def _stage_begins(history: Sequence[dict[str, Any]], index: int) -> bool:
    return history[index]["stage"] != history[index - 1]["stage"]
