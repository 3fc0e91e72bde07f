"""The report's figures: parity and speed, as SVG that goes into HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..speed import format_rate

GOOD, BAD, LIMIT = "#2a7d2e", "#b3261e", "#444444"
LEAST = 1e-9  # smaller errors, zero included, are drawn there


def parity_svg(parities: Sequence[dict[str, Any]]) -> str:
    """Draw a row per comparison with a dot per batch size, and the limit of the error."""
    stages = list(dict.fromkeys(p["stage"] for p in parities))
    figure, axes = _figure(len(stages))
    for p in parities:
        y = stages.index(p["stage"])
        axes.plot([p["limit"]] * 2, [y - 0.35, y + 0.35], color=LIMIT, linewidth=2)
        if p["error"] is None:  # it did not run, or gave NaN
            axes.plot(p["limit"], y, "x", color=BAD, markersize=10, markeredgewidth=2)
            continue
        color = GOOD if p["passed"] else BAD
        axes.plot(max(p["error"], LEAST), y, "o", color=color, alpha=0.7, markersize=7)
    axes.set_xscale("log")
    axes.set_yticks(range(len(stages)), stages)
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.set_xlabel("largest error, of the outputs' spread (dots: batch sizes; line: limit)")
    axes.grid(axis="x", alpha=0.3)
    return _svg(figure)


def speed_svg(rows: Sequence[tuple[str, str, int, float]]) -> str:
    """Draw bars of images per second; ``rows`` are file, runtime, batch, images/s."""
    figure, axes = _figure(len(rows))
    values = [row[3] for row in rows]
    axes.barh(range(len(rows)), values, color="#3b6ea5", height=0.6)
    for y, value in enumerate(values):
        axes.annotate(
            format_rate(value),
            (value, y),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    names = [f"{file}, {runtime}, batch {batch}" for file, runtime, batch, _ in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_xlabel("images per second")
    axes.grid(axis="x", alpha=0.3)
    return _svg(figure)


def reliability_svg(rows: Sequence[dict[str, Any]]) -> str:
    """Draw accuracy over confidence: on the diagonal the model is as right as it is sure."""
    if not rows:
        return ""
    figure = Figure(figsize=(4.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    x, y = ([row[key] for row in rows] for key in ("confidence", "accuracy"))
    axes.plot(x, y, marker="o", color="#3b6ea5")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    return _svg(figure)


def _figure(rows: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, 0.9 + 0.36 * rows), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _svg(figure: Figure) -> str:
    # Text stays text, which can be selected and searched, in the reader's font.
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "fastadapt",
        "font.family": "sans-serif",
    }
    content = io.StringIO()
    with rc_context(settings):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    return text[text.index("<svg") :]
