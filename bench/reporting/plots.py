"""Pictures of a result file: speed-ups, time over size, roofline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastadapt.kernels.common.arithmetic import ceil_div
from fastadapt.train.plots import save_figure

from ..operation import BOTH
from . import tables as report

KINDS = {
    "speedup": "Speed-up of every benchmark over its best baseline",
    "size": "Time over size",
    "roofline": "Roofline",
}
COLORS = {
    "ours": "tab:blue",
    "ours, compiled": "tab:cyan",
    "ours, eager": "tab:cyan",
    "compiled": "tab:orange",
    "eager": "tab:green",
    "upstream": "tab:red",
    "dense": "0.45",
}
MARKERS = {"forward": "o", "backward": "s"}


def paths(results: Path) -> list[Path]:
    """Where the pictures of a result file are."""
    return [results.with_name(f"{results.stem}-{kind}.png") for kind in KINDS]


def write_plots(path: Path, results: dict[str, Any]) -> list[Path]:
    """Draws what there is to draw.

    Args:
        path: of the result file; the pictures go beside it.
        results: its content.

    Returns:
        The pictures that were written.
    """
    written = []
    figures = (speedups(results), sizes(results), roofline(results))
    for target, figure in zip(paths(path), figures, strict=True):
        if figure is not None:
            save_figure(figure, target)
            written.append(target)
    return written


def speedups(results: dict[str, Any]) -> Figure | None:
    """Bars: the best baseline's time over ours, one panel per benchmark, one bar per part."""
    panels = {}
    for name, result in results["benchmarks"].items():
        bars = list(_speedups(result))
        if bars:
            panels[name] = bars
    if not panels:
        return None
    rows = ceil_div(len(panels), 2)
    tallest = [
        max(len(bars) for bars in list(panels.values())[2 * row : 2 * row + 2])
        for row in range(rows)
    ]
    heights = [1.2 + 0.26 * bars for bars in tallest]
    figure = Figure(figsize=(14, sum(heights) + 0.6), dpi=120, layout="constrained")
    figure.suptitle(f"Time of the best baseline over ours, {_machine(results)}")
    axes = figure.subplots(rows, 2, squeeze=False, height_ratios=heights)
    axes = iter(axes.flat)
    for name, bars in panels.items():
        _draw_bars(next(axes), name, bars)
    for panel in axes:
        panel.set_axis_off()
    shown = dict.fromkeys(base for bars in panels.values() for *_, base in bars)
    handles = [Line2D([], [], color=COLORS[b], linewidth=6, label=f"over {b}") for b in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def sizes(results: dict[str, Any]) -> Figure | None:
    """Lines: time of every provider over size, a row per operation, forward and both directions."""
    chosen = {}
    for name, result in results["benchmarks"].items():
        records = [r for r in result.get("records", []) if "parts" in r]
        if len({r["size"] for r in records}) > 1 and BOTH in records[0]["parts"]:
            chosen[name] = sorted(records, key=lambda r: r["size"])
    if not chosen:
        return None
    figure = Figure(figsize=(12, 3.8 * len(chosen) + 0.5), dpi=120, layout="constrained")
    figure.suptitle(f"Time over size, {_machine(results)}")
    grid = figure.subplots(len(chosen), 2, squeeze=False)
    shown = {}
    for row, (name, records) in zip(grid, chosen.items(), strict=True):
        for axes, part in zip(row, ("forward", BOTH), strict=True):
            _draw_sizes(axes, name, part, records)
            handles, labels = axes.get_legend_handles_labels()
            shown |= dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown))
    return figure


def roofline(results: dict[str, Any]) -> Figure | None:
    """Points: FLOP/s of ours (filled) and compiled (hollow) under what this machine reaches."""
    environment = results["environment"]
    points = list(_points(results))
    if not points or "copy, TB/s" not in environment:
        return None
    bandwidth, rate = environment["copy, TB/s"], environment["matrix product, TFLOP/s"]
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for name, *_ in points))
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    low = min(intensity for *_, intensity, _ in points) / 2
    high = max([*(intensity for *_, intensity, _ in points), rate / bandwidth]) * 3
    roof = [low, rate / bandwidth, high]
    axes.plot(roof, [min(i * bandwidth, rate) for i in roof], color="black", linewidth=1.5)
    for name, part, provider, intensity, achieved in points:
        face = colors[name] if provider == "ours" else "none"
        axes.plot(
            intensity, achieved, MARKERS[part], color=colors[name], markerfacecolor=face, alpha=0.8
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte that must be moved",
        ylabel="TFLOP/s",
        title=f"Roofline, {_machine(results)}\n"
        f"measured: {bandwidth:.2f} TB/s copy, {rate:.0f} TFLOP/s {environment['dtype']} product",
    )
    axes.grid(alpha=0.3, which="both")

    def entry(label, **style):
        return Line2D([], [], linestyle="none", label=label, **style)

    handles = [entry(name, marker="o", color=colors[name]) for name in names]
    handles += [entry(part, marker=MARKERS[part], color="0.4") for part in MARKERS]
    shown = dict.fromkeys(provider for _, _, provider, *_ in points)
    handles += [
        entry(
            provider,
            marker="D",
            color="0.4",
            markerfacecolor="0.4" if provider == "ours" else "none",
        )
        for provider in shown
    ]
    axes.legend(handles=handles, loc="lower right", fontsize=9)
    return figure


def _speedups(result: dict[str, Any]) -> Iterator[tuple[str, float, float, str]]:
    """Label, speed-up, its noise and the baseline, for every shape and part."""
    for record in result.get("records", []):
        for part, metrics in record.get("parts", {}).items():
            values = metrics.get("gpu_us") or metrics.get("wall_us", {})
            base = report.best_baseline(values)
            if base is None or "ours" not in values:
                continue
            ours, other = values["ours"], values[base]
            noise = sum((v["high"] - v["low"]) / v["median"] for v in (ours, other)) / 2
            ratio = other["median"] / ours["median"]
            yield f"{record['shape']}, {part}", ratio, ratio * noise, base


def _draw_bars(axes: Axes, name: str, bars: list[tuple[str, float, float, str]]) -> None:
    labels, ratios, noise, bases = zip(*bars, strict=True)
    colors = [COLORS[base] for base in bases]
    places = range(len(bars))
    axes.barh(places, ratios, color=colors, alpha=0.85, xerr=noise, error_kw={"ecolor": "0.3"})
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    right = max(r + n for r, n in zip(ratios, noise, strict=True))
    axes.set_xlim(0, max(1.1, right) * 1.15)
    for place, ratio, width in zip(places, ratios, noise, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        at = (ratio + width, place)
        style = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(f"{ratio:.2f}×", at, bbox=box, **style)
    axes.set(title=name, xlabel="speed-up (1: as fast)")


def _draw_sizes(axes: Axes, name: str, part: str, records: list[dict[str, Any]]) -> None:
    metric = "gpu_us" if "gpu_us" in records[0]["parts"][part] else "wall_us"
    providers = dict.fromkeys(p for r in records for p in r["parts"][part].get(metric, {}))
    for provider in providers:
        points = [
            (r["size"], report.center(r["parts"][part][metric][provider]))
            for r in records
            if provider in r["parts"][part].get(metric, {})
        ]
        style = {"color": COLORS.get(provider), "marker": "o", "markersize": 5, "linewidth": 0.8}
        axes.plot(*zip(*points, strict=True), label=provider, **style)
    floors = [(r["size"], r["parts"][part]["floor_us"]) for r in records]
    axes.plot(*zip(*floors, strict=True), color="black", linestyle=":", label="floor")
    axes.set(
        xscale="log",
        yscale="log",
        title=f"{name}, {part}",
        xlabel=records[0]["dimensions"],
        ylabel=f"{report.METRICS[metric].partition(' of')[0]} in µs",
    )
    axes.grid(alpha=0.3, which="both")


def _points(results: dict[str, Any]) -> Iterator[tuple[str, str, str, float, float]]:
    """Benchmark, part, provider, FLOP per byte, TFLOP/s."""
    for name, result in results["benchmarks"].items():
        for record in result.get("records", []):
            for part, metrics in record.get("parts", {}).items():
                if part not in MARKERS or "flops" not in metrics:
                    continue
                values = metrics.get("gpu_us") or metrics.get("wall_us", {})
                for provider in ("ours", "compiled"):
                    if provider in values:
                        time = max(report.center(values[provider]), math.ulp(1.0))
                        intensity = metrics["flops"] / metrics["bytes"]
                        yield name, part, provider, intensity, metrics["flops"] / time / 1e6


def _machine(results: dict[str, Any]) -> str:
    environment = results["environment"]
    return f"{environment['gpu'] or 'CPU'}, {environment['dtype']}, commit {environment['commit']}"
