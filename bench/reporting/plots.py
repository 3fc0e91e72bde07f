"""Draw pictures of a result file: speed-ups, time over size, roofline, phases of whole jobs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastadapt.kernels.common.arithmetic import ceil_div
from fastadapt.train.plots import save_figure

from ..operation import BOTH
from ..protocol import METRICS, Record, Result, Results, Timeline, center
from .tables import best_baseline, ratio

KINDS = {
    "speedup": "Speed-up of every benchmark over its best baseline",
    "size": "Time over size",
    "roofline": "Roofline",
    "phases": "Phases of whole jobs",
}
PHASE_COLORS = {
    "start": "0.6",
    "decode": "tab:purple",
    "features": "tab:cyan",
    "stage 1": "tab:blue",
    "stage 2": "tab:orange",
    "validation": "tab:green",
    "saving": "tab:red",
    "other": "0.85",
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


def paths(results: Path) -> dict[str, Path]:
    """Return where the pictures of a result file are, by kind."""
    return {kind: results.with_name(f"{results.stem}-{kind}.png") for kind in KINDS}


def write_plots(path: Path, results: Results) -> list[Path]:
    """Draw what there is to draw.

    Args:
        path: of the result file; the pictures go beside it.
        results: its content.

    Returns:
        The pictures that were written.
    """
    written = []
    figures = (speedups(results), sizes(results), roofline(results), phases(results))
    for target, figure in zip(paths(path).values(), figures, strict=True):
        if figure is not None:
            save_figure(figure, target)
            written.append(target)
    return written


def speedups(results: Results) -> Figure | None:
    """Draw bars: the best baseline's time over ours, one panel per benchmark, one bar per part."""
    panels = {}
    for name, result in results.benchmarks.items():
        bars = list(_speedups(result))
        if bars:
            panels[_titled(name, result, results)] = bars
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
    grid = iter(figure.subplots(rows, 2, squeeze=False, height_ratios=heights).flat)
    for name, bars in panels.items():
        _draw_bars(next(grid), name, bars)
    for panel in grid:
        panel.set_axis_off()
    shown = dict.fromkeys(bar.base for bars in panels.values() for bar in bars)
    handles = [Line2D([], [], color=COLORS[b], linewidth=6, label=f"over {b}") for b in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def sizes(results: Results) -> Figure | None:
    """Draw lines: time over size, a row per operation, forward and both directions."""
    chosen = {}
    for name, result in results.benchmarks.items():
        records = result.timed
        if len({r.size for r in records}) > 1 and BOTH in records[0].parts:
            title = _titled(name, result, results)
            chosen[title] = sorted(records, key=lambda record: record.size)
    if not chosen:
        return None
    figure = Figure(figsize=(12, 3.8 * len(chosen) + 0.5), dpi=120, layout="constrained")
    figure.suptitle(f"Time over size, {_machine(results)}")
    grid = figure.subplots(len(chosen), 2, squeeze=False)
    shown: dict[str, Any] = {}
    for row, (name, records) in zip(grid, chosen.items(), strict=True):
        for axes, part in zip(row, ("forward", BOTH), strict=True):
            _draw_sizes(axes, name, part, records)
            handles, labels = axes.get_legend_handles_labels()
            shown |= dict(zip(labels, handles, strict=True))
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=len(shown))
    return figure


def roofline(results: Results) -> Figure | None:
    """Draw points: FLOP/s of ours (filled) and compiled (hollow) below the machine's rates."""
    points = list(_points(results))
    if not points:
        return None
    environment = results.environments[0]
    bandwidth, rate = environment.copy_rate, environment.product_rate
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(point.name for point in points))
    colors = {name: f"C{index}" for index, name in enumerate(names)}
    low = min(point.intensity for point in points) / 2
    high = max([*(point.intensity for point in points), rate / bandwidth]) * 3
    roof = [low, rate / bandwidth, high]
    axes.plot(roof, [min(i * bandwidth, rate) for i in roof], color="black", linewidth=1.5)
    for point in points:
        color = colors[point.name]
        face = color if point.provider == "ours" else "none"
        style: dict[str, Any] = {"color": color, "markerfacecolor": face, "alpha": 0.8}
        axes.plot(point.intensity, point.achieved, MARKERS[point.part], **style)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte that must be moved",
        ylabel="TFLOP/s",
        title=f"Roofline, {_machine(results)}\n"
        f"measured: {bandwidth:.2f} TB/s copy, {rate:.0f} TFLOP/s {environment.dtype} product",
    )
    axes.grid(alpha=0.3, which="both")

    def entry(label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="none", label=label, **style)

    handles = [entry(name, marker="o", color=colors[name]) for name in names]
    handles += [entry(part, marker=MARKERS[part], color="0.4") for part in MARKERS]
    shown = dict.fromkeys(point.provider for point in points)
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


def phases(results: Results) -> Figure | None:
    """Draw stacked bars: the phases of whole commands, a panel per job."""
    jobs: dict[str, list[Timeline]] = {}
    for result in results.benchmarks.values():
        for line in result.timelines:
            jobs.setdefault(_titled(line.job, result, results), []).append(line)
    if not jobs:
        return None
    heights = [1 + 0.5 * len(lines) for lines in jobs.values()]
    figure = Figure(figsize=(10, sum(heights) + 1), dpi=120, layout="constrained")
    figure.suptitle(f"Phases of whole jobs, {_machine(results)}")
    panels = figure.subplots(len(jobs), 1, squeeze=False, height_ratios=heights)
    for axes, (job, lines) in zip(panels.flat, jobs.items(), strict=True):
        _draw_phases(axes, job, lines)
    shown = {phase for lines in jobs.values() for line in lines for phase in line.seconds}
    handles = [
        Line2D([], [], color=color, linewidth=6, label=phase)
        for phase, color in PHASE_COLORS.items()
        if phase in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


@dataclass(frozen=True)
class _Bar:
    """A speed-up with half the distance that its samples span, over the fastest baseline."""

    label: str
    ratio: float
    noise: float
    base: str


@dataclass(frozen=True)
class _Point:
    """A measured part on the roofline: FLOP per byte, TFLOP/s."""

    name: str
    part: str
    provider: str
    intensity: float
    achieved: float


def _speedups(result: Result) -> Iterator[_Bar]:
    """Yield a bar for every shape and part whose times are not all noise."""
    for record in result.timed:
        for name, part in record.parts.items():
            times = part.times
            base = best_baseline(times)
            found = ratio(times, base)
            if base is None or found is None:
                continue
            noise = sum(value.width / value.median for value in (times["ours"], times[base])) / 2
            yield _Bar(f"{record.shape}, {name}", found, found * noise, base)


def _draw_bars(axes: Axes, name: str, bars: list[_Bar]) -> None:
    ratios, noise = [bar.ratio for bar in bars], [bar.noise for bar in bars]
    colors = [COLORS[bar.base] for bar in bars]
    places = range(len(bars))
    axes.barh(places, ratios, color=colors, alpha=0.85, xerr=noise, error_kw={"ecolor": "0.3"})
    axes.set_yticks(places, [bar.label for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    right = max(bar.ratio + bar.noise for bar in bars)
    axes.set_xlim(0, max(1.1, right) * 1.15)
    for place, bar in zip(places, bars, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        at = (bar.ratio + bar.noise, place)
        style: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points"}
        axes.annotate(f"{bar.ratio:.2f}×", at, bbox=box, va="center", fontsize=8, **style)
    axes.set(title=name, xlabel="speed-up (1: as fast)")


def _draw_sizes(axes: Axes, name: str, part: str, records: list[Record]) -> None:
    metric = "gpu_us" if records[0].parts[part].gpu_us else "wall_us"
    measured = [(record.size, record.parts[part]) for record in records]
    providers = dict.fromkeys(p for _, found in measured for p in found.values(metric))
    for provider in providers:
        points = [
            (size, center(found.values(metric)[provider]))
            for size, found in measured
            if provider in found.values(metric)
        ]
        style: dict[str, Any] = {"color": COLORS.get(provider), "marker": "o", "markersize": 5}
        axes.plot(*zip(*points, strict=True), label=provider, linewidth=0.8, **style)
    floors = [(size, found.floor_us) for size, found in measured if found.floor_us is not None]
    if floors:
        axes.plot(*zip(*floors, strict=True), color="black", linestyle=":", label="floor")
    axes.set(
        xscale="log",
        yscale="log",
        title=f"{name}, {part}",
        xlabel=records[0].dimensions,
        ylabel=f"{METRICS[metric].partition(' of')[0]} in µs",
    )
    axes.grid(alpha=0.3, which="both")


def _draw_phases(axes: Axes, job: str, lines: list[Timeline]) -> None:
    for place, line in enumerate(lines):
        left = 0.0
        for phase, color in PHASE_COLORS.items():
            width = line.seconds.get(phase, 0.0)
            axes.barh(place, width, left=left, color=color)
            left += width
        axes.annotate(
            f"{line.total:.1f} s",
            (left, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    labels = [f"{line.provider}, {line.start}" for line in lines]
    axes.set_yticks(range(len(lines)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(line.total for line in lines))
    axes.set(title=job, xlabel="seconds from the start of the command")


def _points(results: Results) -> Iterator[_Point]:
    for name, result in results.benchmarks.items():
        for record in result.timed:
            for part_name in MARKERS:
                part = record.parts.get(part_name)
                if part is None or part.flops is None or not part.bytes:
                    continue
                for provider in ("ours", "compiled"):
                    if provider in part.times:
                        time = max(center(part.times[provider]), math.ulp(1.0))
                        intensity = part.flops / part.bytes
                        achieved = part.flops / time / 1e6
                        title = _titled(name, result, results)
                        yield _Point(title, part_name, provider, intensity, achieved)


def _titled(name: str, result: Result, results: Results) -> str:
    """Return a benchmark's name, or a job's, with its commit where that is not the newest."""
    commit = result.environment.commit if result.environment else None
    return name if commit == results.environments[0].commit else f"{name} ({commit})"


def _machine(results: Results) -> str:
    environment = results.environments[0]
    return f"{environment.name}, {environment.dtype}, commit {environment.commit}"
