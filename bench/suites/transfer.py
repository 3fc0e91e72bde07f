"""Judge recipes on image sets that need no download: the command is ``fastadapt bench transfer``.

Every set is split five times into 75 % and 25 %, stratified; 15 % of the 75 % validate. Each run
trains on the rest, keeps the epoch that validation chooses, and is measured once on the 25 %.

- *linear probe*: logistic regression on the mean of the frozen features, C chosen on validation,
  then fitted to training and validation together.
- *default*: what ``fastadapt train`` does without options; other recipes, too, with ``--study``.
- *full fine-tuning*: everything trains from the start, with a linear head; of two learning rates
  validation chooses, on the first split.
- *best recipe*: everything trains, by ``best_recipe`` with three seeds; with ``--what best``.

Raw results go to a JSON file, one entry for each run; what is there is not repeated. Recipes were
chosen on validation figures; the test figures are only reported.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastadapt.train.devices import parse_device

from ..image_sets import image_sets
from ..protocol import Benchmark, LeftOut, Outcome, Row, Tables
from ..transfer_recipes import BACKBONES, BEST, DEFAULT, FULL, PROBE, RECIPES, SEEDS
from ..transfer_runs import (
    Store,
    accuracies,
    best_runs,
    frozen_runs,
    full_runs,
    weights_of,
)


def table(runs: dict[str, dict[str, Any]], methods: list[str]) -> list[Row]:
    """Return a row for each set and backbone: test accuracy in %, mean ± deviation over splits.

    Beside the methods, the mean difference of the second to the first with the 95 % interval of
    Student's t over the splits.
    """
    from scipy.stats import t

    rows = []
    for item, backbone in dict.fromkeys(tuple(key.split(" | ")[:2]) for key in runs):
        row: Row = {"images": item, "backbone": backbone}
        values = {}
        for method in methods:
            found = accuracies(runs, item, backbone, method, "test")
            if found:
                values[method] = found
                row[method] = _spread(list(found.values()))
        if len(values) > 1:
            first, second = list(values.values())[:2]
            both = sorted(first.keys() & second.keys())
            differences = np.array([100 * (second[s] - first[s]) for s in both])
            width = np.nan
            if len(both) > 1:
                error = differences.std(ddof=1) / len(both) ** 0.5
                width = float(t.ppf(0.975, len(both) - 1) * error)
            low, high = differences.mean() - width, differences.mean() + width
            names = list(values)
            row[f"{names[1]} − {names[0]}"] = (
                f"{differences.mean():+.1f} ({low:+.1f} to {high:+.1f})"
            )
        rows.append(row)
    return rows


def choices(runs: dict[str, dict[str, Any]]) -> list[Row]:
    """Return a row for each recipe: validation accuracy in % by set, backbones together."""
    items = list(dict.fromkeys(key.split(" | ")[0] for key in runs))
    methods = list(dict.fromkeys(key.split(" | ")[2] for key in runs))
    rows = []
    for method in methods:
        row: Row = {"recipe": method}
        for item in items:
            backbones = dict.fromkeys(k.split(" | ")[1] for k in runs if k.startswith(item))
            found = [
                value
                for backbone in backbones
                for value in accuracies(runs, item, backbone, method, "val").values()
            ]
            row[item] = _spread(found) if found else ""
        rows.append(row)
    return rows


def _spread(values: list[float]) -> str:
    deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation}"


NOTES = (
    "Accuracy on test images in %, mean ± standard deviation over five random splits of 75 and "
    "25 %; differences of the same splits with the 95 % interval of Student's t. The backbones are "
    "ImageNet's EfficientNet-Lite0 and Lite2."
)
METHODS = [PROBE, DEFAULT, FULL]


def _run(quick: bool) -> Iterator[Outcome]:
    device = parse_device("auto")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = Store(folder / "transfer.json")
        seeds = range(1 if quick else SEEDS)
        sets = image_sets(folder, 120 if quick else None)
        for backbone in list(BACKBONES)[: 1 if quick else None]:
            weights = weights_of(backbone, folder)
            if weights is None:
                yield LeftOut(f"{backbone}: the package {BACKBONES[backbone][0]} is not installed")
                continue
            for item in sets:
                recipes = {DEFAULT: RECIPES[DEFAULT]}
                frozen_runs(item, backbone, weights, recipes, seeds, device, store)
                if device.type == "cuda":
                    full_runs(item, backbone, weights, seeds, str(device), store)
                yield Tables({"test accuracy, %": table(store.runs, METHODS)}, progress=item.name)


BENCHMARK = Benchmark("Transfer to small image sets", NOTES, _run, slow=True)


def main() -> None:
    """Run a share of all runs, or print the tables of result files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file of raw results")
    parser.add_argument("--sets", type=Path, required=True, help="folder for generated images")
    parser.add_argument("--what", choices=("frozen", "full", "best"), required=True)
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    parser.add_argument("--only", default="", help="sets whose names begin so, with semicolons")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--recipes", default="", help="names with semicolons; all if empty")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--positions", type=int)
    given = parser.parse_args()
    given.sets.mkdir(parents=True, exist_ok=True)
    store, device = Store(given.out), parse_device(given.device)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    names = [name for name in given.recipes.split(";") if name]
    for backbone in given.backbones.split(","):
        weights = weights_of(backbone, given.sets)
        assert weights is not None, f"{BACKBONES[backbone][0]} is not installed"
        for item in image_sets(given.sets, given.limit):
            if not item.name.startswith(tuple(given.only.split(";"))):
                continue
            if given.what == "frozen":
                recipes = {name: RECIPES[name] for name in names or RECIPES}
                frozen_runs(item, backbone, weights, recipes, seeds, device, store, given.positions)
            elif given.what == "full":
                full_runs(item, backbone, weights, seeds, given.device, store)
            else:
                best_runs(item, backbone, weights, BEST, seeds, given.device, store)
    print(json.dumps(choices(store.runs), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
