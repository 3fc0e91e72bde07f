"""Pictures of a training run: curves and confusion matrices.

Figures are made without pyplot: no global state, no window system.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastadapt.files import atomic_path


def plot_curves(
    history: Sequence[dict[str, Any]], path: str | os.PathLike, best: int | None = None
) -> None:
    """Draw loss on the left, validation accuracy and macro-F1 on the right, over epochs.

    Args:
        history: the lines of ``metrics.jsonl``.
        path: of the PNG, written whole or not at all.
        best: index of the epoch that was kept; marked if given.
    """
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    loss, score = figure.subplots(1, 2)
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


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _stage_begins(history: Sequence[dict[str, Any]], index: int) -> bool:
    return history[index]["stage"] != history[index - 1]["stage"]
