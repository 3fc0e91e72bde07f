"""Pictures of a training run: curves and confusion matrices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastadapt.files import atomic_path


def plot_curves(
    history: Sequence[dict[str, Any]], path: str | os.PathLike, best: int | None = None
) -> None:
    """Loss on the left, validation accuracy and macro-F1 on the right, over epochs; a PNG.

    Args:
        history: the lines of ``metrics.jsonl``.
        path: of the PNG, written whole or not at all.
        best: index of the epoch that was kept; marked if given.
    """
    # Figure instead of pyplot: no global state, no window system.
    from matplotlib.figure import Figure

    epochs = np.arange(1, len(history) + 1)
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    loss, score = figure.subplots(1, 2)
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
                (first + 0.5, 0.02),
                xycoords=("data", "axes fraction"),
                color="0.4",
            )
        if best is not None:
            axes.axvline(best + 1, color="tab:green", linewidth=1, alpha=0.6, label="kept epoch")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_ylabel("loss")
    score.set_ylabel("validation score")
    _save(figure, path)


def plot_confusion(
    confusion: Sequence[Sequence[int]],
    classes: Sequence[str],
    path: str | os.PathLike,
    title: str = "",
) -> None:
    """A confusion matrix as a PNG: counts, coloured by the share of the true class.

    Args:
        confusion: [K, K], true class in rows, predicted class in columns.
        classes: K names.
        path: of the PNG, written whole or not at all.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    counts = np.asarray(confusion)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(max(4.0, 1.5 + 0.6 * len(classes)), 20.0)
    figure = Figure(figsize=(size + 1, size), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if len(classes) <= 20:
        for row, column in np.ndindex(*counts.shape):
            axes.text(
                column,
                row,
                counts[row, column],
                ha="center",
                va="center",
                color="white" if share[row, column] > 0.5 else "black",
            )
    _save(figure, path)


def _stage_begins(history: Sequence[dict[str, Any]], index: int) -> bool:
    return history[index]["stage"] != history[index - 1]["stage"]


def _save(figure, path: str | os.PathLike) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
