"""Put the results of folds and seeds together: means, deviations, intervals, tables.

Everything is read from the runs' own files, so that it is the same after an interruption.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fastadapt.data.dataset import Dataset
from fastadapt.data.pixels import ValueRange
from fastadapt.decision import Decision
from fastadapt.errors import InputError, counted
from fastadapt.files import read_json, write_json, write_text
from fastadapt.train.intervals import bootstrap_intervals
from fastadapt.train.metrics import SCORES, scores
from fastadapt.train.mistakes import Mistakes, draw_mistakes
from fastadapt.train.plots import plot_evaluation
from fastadapt.train.run_folder import EVALUATION, MISTAKES, PREDICTIONS, RESULTS, SPLITS

FOLDS, TABLE = "folds.json", "folds.csv"
FORMAT, FORMAT_VERSION = "fastadapt-folds", 1
SHOWN = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")


@dataclass(frozen=True)
class PlannedRun:
    """One run of several.

    Attributes:
        folder: its name below the results' folder.
        fold: the number of the fold that is held out, from 1; ``None`` without folds.
        seed: of its training.
    """

    folder: str
    fold: int | None
    seed: int


@dataclass(frozen=True)
class FoldsResult:
    """What training on folds, or with several seeds, gave.

    Attributes:
        out: the folder, for ``fastadapt export``.
        runs: the run folders.
        summary: ``folds.json``: each run's scores, ``mean``, ``pooled`` and their intervals.
    """

    out: Path
    runs: tuple[Path, ...]
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """The predictions of all runs for images that they did not train on.

    Attributes:
        paths: [N], of the images; with several seeds each is there several times.
        labels, predictions: [N] class indices.
        probabilities: [N, K].
    """

    paths: list[str]
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray


def read_folds(out: Path) -> dict[str, Any]:
    """Read ``folds.json``.

    Raises:
        InputError: there is none, or one that this version cannot read.
    """
    found = read_json(out / FOLDS)
    if found.get("format") != FORMAT:
        raise InputError(f"{out / FOLDS} does not describe folds of fastadapt")
    if found.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{out} was written by another version of fastadapt (format {found.get('version')!r}, "
            f"this one reads {FORMAT_VERSION}): update fastadapt"
        )
    return found


def read_predicted(
    out: Path, plan: Sequence[PlannedRun], classes: Sequence[str], split: str
) -> HeldOut:
    """Read what every run predicted for a split, from its ``predictions.csv``.

    Args:
        out: the folder of the runs.
        plan: the runs.
        classes: names.
        split: its name.
    """
    place = {name: index for index, name in enumerate(classes)}
    paths, labels, predictions, probabilities = [], [], [], []
    for run in plan:
        with (out / run.folder / PREDICTIONS).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        where = out / run.folder / RESULTS
        decision = Decision.from_dict(read_json(where).get("decision"), str(where))
        for row in rows:
            if row["split"] == split:
                paths.append(row["path"])
                labels.append(place[row["target"]])
                values = [float(row[f"probability_{name}"]) for name in classes]
                probabilities.append(values)
                if row["prediction"]:
                    predictions.append(place[row["prediction"]])
                else:  # undecided, which is judged by the class that it would get
                    predictions.append(int(decision.classes(np.array([values]))[0]))
    return HeldOut(paths, np.array(labels), np.array(predictions), np.array(probabilities))


def held_out_split(splits: Mapping[str, Any]) -> str:
    """Return the split that judges a run: test, or validation where there is no test."""
    return "test" if "test" in splits else "val"


def summarize(
    out: Path,
    plan: Sequence[PlannedRun],
    dataset: Dataset,
    described: dict[str, Any],
    value_range: ValueRange | None = None,
) -> dict[str, Any]:
    """Put all runs' results together, and draw them.

    Args:
        out: the folder of the runs.
        plan: the runs, all of them finished.
        dataset: the whole data set; its groups are what intervals draw.
        described: what ``folds.json`` says of the plan.
        value_range: of the pixels, for the pictures of mistakes.

    Returns:
        For ``folds.json``. ``mean`` holds the mean and the sample's standard deviation over runs,
        of the model, of the linear probe and of their difference; ``pooled`` the scores of all
        held-out predictions together, with bootstrap intervals over images or groups.
    """
    results = [read_json(out / run.folder / RESULTS) for run in plan]
    split = held_out_split(results[0])
    rows = [_run_row(run, found, split) for run, found in zip(plan, results, strict=True)]
    held = read_predicted(out, plan, dataset.classes, split)
    groups = {str(sample.path): sample.group for sample in dataset.samples}
    clusters = [groups[path] or path for path in held.paths]
    values = (held.labels, held.predictions, held.probabilities)
    pooled = scores(*values, dataset.classes)
    plot_evaluation(
        out / EVALUATION, split, pooled, held.labels, held.probabilities, dataset.classes
    )
    found = Mistakes.find([Path(path) for path in held.paths], *values)
    draw_mistakes(out / MISTAKES, found, dataset.classes, value_range)
    return {
        **described,
        "finished": True,
        "held_out": split,
        "runs": rows,
        "mean": mean_scores(rows),
        "pooled": {
            **pooled,
            "intervals": bootstrap_intervals(*values, clusters),
            "clusters": "groups" if any(groups.values()) else "images",
        },
    }


def _run_row(run: PlannedRun, results: dict[str, Any], split: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "folder": run.folder,
        "fold": run.fold,
        "seed": run.seed,
        "kept": {key: results["best"][key] for key in ("stage", "epoch")},
        "images": results[split]["images"],
        "model": {name: results[split].get(name) for name in SCORES},
        "val": {name: results["val"].get(name) for name in SCORES},
    }
    if split in results.get("linear_probe", {}):
        row["linear_probe"] = {n: results["linear_probe"][split].get(n) for n in SCORES}
    if "calibration" in results:
        row["temperature"] = results["calibration"]["temperature"]
    return row


def mean_scores(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation of the runs' held-out scores, by what was judged.

    ``difference`` is that of the model to the linear probe on the same fold.
    """
    judged: dict[str, Callable[[dict[str, Any], str], float | None]] = {
        "model": lambda row, name: row["model"][name]
    }
    if all("linear_probe" in row for row in rows):
        judged["linear_probe"] = lambda row, name: row["linear_probe"][name]
        judged["difference"] = lambda row, name: (
            None
            if row["model"][name] is None or row["linear_probe"][name] is None
            else row["model"][name] - row["linear_probe"][name]
        )
    found: dict[str, Any] = {}
    for what, of in judged.items():
        found[what] = {}
        for name in SCORES:
            values = [value for row in rows if (value := of(row, name)) is not None]
            if values:
                found[what][name] = {
                    "mean": float(np.mean(values)),
                    "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                    "runs": len(values),
                }
    return found


def write_summary(
    out: Path, summary: dict[str, Any], dataset: Dataset, held: Sequence[int]
) -> None:
    """Write ``folds.json``, ``folds.csv`` and ``splits.csv``, which gives each image its fold.

    Args:
        out: the folder.
        summary: of :func:`summarize`.
        dataset: the whole data set.
        held: the number of each image's fold, from 1; empty without folds.
    """
    write_json(out / FOLDS, summary)
    write_text(out / TABLE, _table_csv(summary))
    if not held:
        dataset.write_splits(out / SPLITS)
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    grouped = any(sample.group for sample in dataset.samples)
    writer.writerow(["path", "label", *(["group"] if grouped else []), "fold"])
    for sample, fold in zip(dataset.samples, held, strict=True):
        group = [sample.group] if grouped else []
        writer.writerow([sample.path, dataset.classes[sample.label], *group, fold])
    write_text(out / SPLITS, text.getvalue())


def _table_csv(summary: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    judged = [what for what in ("model", "linear_probe") if what in summary["mean"]]
    columns = [(what, name) for what in judged for name in SCORES]
    named = [f"{what}_{name}" if what != "model" else name for what, name in columns]
    writer.writerow(["folder", "fold", "seed", "images", *named])

    def shown(value: float | None) -> str:
        return "" if value is None else f"{round(value, 6):g}"

    for row in summary["runs"]:
        values = [shown(row[what][name]) for what, name in columns]
        fold = "" if row["fold"] is None else row["fold"]
        writer.writerow([row["folder"], fold, row["seed"], row["images"], *values])
    for key in ("mean", "std"):
        values = [shown(summary["mean"][w].get(name, {}).get(key)) for w, name in columns]
        writer.writerow([key, "", "", "", *values])
    return text.getvalue()


def folds_table(result: FoldsResult) -> Table:
    """Return means ± deviations over runs, and pooled intervals, as a table for the terminal."""
    summary = result.summary
    count, split = len(summary["runs"]), summary["held_out"]
    table = Table(show_header=True, box=None, pad_edge=False)
    table.add_column(f"{split}, {counted(count, 'run')}, in %", style="bold")
    names = [name for name in SHOWN if name in summary["mean"]["model"]]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for what, found in summary["mean"].items():
        values = []
        for name in names:
            if name not in found:
                values.append("–")
                continue
            sign = "+" if what == "difference" else ""
            std = "" if found[name]["std"] is None else f" ± {found[name]['std'] * 100:.1f}"
            values.append(f"{found[name]['mean'] * 100:{sign}.1f}{std}")
        table.add_row(what.replace("_", " "), *values)
    intervals = summary["pooled"]["intervals"]
    values = [
        f"{intervals[name][0] * 100:.1f} to {intervals[name][1] * 100:.1f}"
        if name in intervals
        else "–"
        for name in names
    ]
    table.add_row("95 % interval", *values)
    return table
