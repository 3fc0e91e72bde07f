"""Split image sets, train recipes on them and keep what each run gave."""

from __future__ import annotations

import csv
import importlib
import io
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastadapt.checkpoint_reader import read_state_dict
from fastadapt.config import AdaptConfig
from fastadapt.data.dataset import Sample
from fastadapt.files import read_json, write_json, write_tensors, write_text
from fastadapt.progress import progress_bars
from fastadapt.train.config import TrainConfig
from fastadapt.train.cross_validation import train_folds
from fastadapt.train.fold_settings import FoldSettings
from fastadapt.train.linear_probe import linear_probe
from fastadapt.train.metrics import classification_metrics
from fastadapt.train.run import train
from fastadapt.train.run_folder import RESULTS
from fastadapt.train.trial_features import frozen_backbone, trial_features
from fastadapt.train.trials import Features, Trial

from .image_sets import ImageSet
from .transfer_recipes import (
    BACKBONES,
    BEST_RECIPE,
    CROP,
    FLIPPED,
    FULL,
    FULL_RATES,
    PROBE,
    PROBE_PYRAMID,
    TEST_SHARE,
    VAL_SHARE,
    Recipe,
    best_recipe,
    full_config,
)

SHOWN = ("accuracy", "macro_f1", "loss")
MEMBER_SEED = 1000  # between the seeds of one split's runs


class Store:
    """Results of runs in a JSON file, by set, backbone, method and seed."""

    def __init__(self, path: Path):
        self.path = path
        self.runs: dict[str, dict[str, Any]] = read_json(path)["runs"] if path.exists() else {}

    @staticmethod
    def key(item: str, backbone: str, method: str, seed: int) -> str:
        """Return the name of a run."""
        return f"{item} | {backbone} | {method} | {seed}"

    def add(self, key: str, found: dict[str, Any]) -> None:
        """Keep what a run gave, and write the file."""
        self.runs[key] = found
        write_json(self.path, {"runs": self.runs})


def splits(item: ImageSet, seed: int) -> dict[str, np.ndarray]:
    """Return the places of training, validation and test images."""
    from sklearn.model_selection import train_test_split

    strata = np.array(item.strata)
    places = np.arange(len(strata))
    rest, test = train_test_split(places, test_size=TEST_SHARE, stratify=strata, random_state=seed)
    inner = train_test_split(rest, test_size=VAL_SHARE, stratify=strata[rest], random_state=seed)
    return {"train": np.sort(inner[0]), "val": np.sort(inner[1]), "test": np.sort(test)}


def write_csv(path: Path, item: ImageSet, seed: int) -> None:
    """Write paths, labels and one draw of splits as ``fastadapt train`` reads them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "split"))
    for split, places in splits(item, seed).items():
        writer.writerows((item.paths[i], item.classes[item.labels[i]], split) for i in places)
    write_text(path, text.getvalue())


def weights_of(backbone: str, folder: Path) -> Path | None:
    """Write a package's ImageNet weights under timm's names; ``None`` if it is not installed."""
    import timm

    package, file = BACKBONES[backbone]
    try:
        module = importlib.import_module(package)
    except ImportError:
        return None
    path = folder / f"{backbone}.safetensors"
    own = timm.create_model(backbone).state_dict()
    theirs = read_state_dict(getattr(module, file).get_model_file_path())
    write_tensors(path, dict(zip(own, theirs.values(), strict=True)))  # they correspond in order
    return path


def measured(
    logits: torch.Tensor, labels: np.ndarray, classes: tuple[str, ...]
) -> dict[str, float]:
    """Return accuracy, macro-F1 and loss."""
    found = classification_metrics(labels, logits.argmax(1).numpy(), classes)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()
    return {"accuracy": found["accuracy"], "macro_f1": found["macro_f1"], "loss": loss}


def run_recipe(
    trial: Trial, parts: dict[str, np.ndarray], seed: int, members: int = 1
) -> dict[str, Any]:
    """Train one split as ``fastadapt train`` does, and again with other seeds.

    Args:
        trial: of the recipe.
        parts: places of training, validation and test images.
        seed: of the first run.
        members: how many runs there are.

    Returns:
        Of the first run ``epoch``, ``val`` and ``test``, after a refit of the model that is saved.
        ``beside`` has what else is judged, by name: ``no refit``, the model before it, and
        ``N seeds``, the mean logits of all runs.
    """
    features = trial.features
    labels, logits, found = features.labels[parts["test"]], [], {}
    for member in range(members):
        own = seed + MEMBER_SEED * member
        if member == 0 or not trial.config.refit:
            best, kept = _chosen_epoch(trial, parts, own)
        if trial.config.refit:
            both = np.sort(np.concatenate([parts["train"], parts["val"]]))
            kept = trial.run(both, parts["test"], own)
        logits.append(kept)
        if member == 0:
            found = {**best, "test": measured(kept, labels, features.classes), "beside": {}}
            if trial.config.refit:
                found["beside"]["no refit"] = best
    if members > 1:
        mean = measured(torch.stack(logits).mean(0), labels, features.classes)
        found["beside"][f"{members} seeds"] = {"test": mean}
    return found


def _chosen_epoch(
    trial: Trial, parts: dict[str, np.ndarray], seed: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the scores of the epoch that validation chooses, and its logits of test images."""
    labels, classes, select = trial.features.labels, trial.features.classes, trial.config.select
    sign, best = (-1 if select == "loss" else 1), None
    for epoch in trial.epochs(parts["train"], seed):
        logits = {split: trial.predict(parts[split]) for split in ("val", "test")}
        found: dict[str, Any] = {
            split: measured(values, labels[parts[split]], classes)
            for split, values in logits.items()
        }
        rank = (sign * found["val"][select], -found["val"]["loss"])
        if best is None or rank > best[0]:
            best = (rank, {**found, "epoch": epoch}, logits["test"])
    assert best is not None
    return best[1:]


def views_are_allowed(item: ImageSet, augment: str) -> bool:
    """Whether views keep the class: a mirrored digit is none, a turned grating is another one."""
    return item.name.startswith(FLIPPED if augment == "flips" else FLIPPED[:1])


def frozen_runs(
    item: ImageSet,
    backbone: str,
    weights: Path,
    recipes: dict[str, Recipe],
    seeds: Iterable[int],
    device: torch.device,
    store: Store,
    positions: int | None = None,
) -> None:
    """Run the probe and all recipes of one set and backbone that are not in the store."""
    seeds = list(seeds)
    probes = {PROBE: Recipe(), PROBE_PYRAMID: Recipe(adapter=AdaptConfig(features="pyramid"))}
    wanted = probes | recipes
    if all(store.key(item.name, backbone, m, s) in store.runs for m in wanted for s in seeds):
        return
    data, shown = None, None
    # Recipes with the same features follow each other: those of one kind are held at a time.
    for name, recipe in sorted(wanted.items(), key=lambda pair: _kind(pair[1])):
        views = _kind(recipe)
        if views[0] > 1 and not views_are_allowed(item, views[1]):
            continue
        if views != shown or data is None:
            data, shown = None, views
            data = _features(item, backbone, weights, recipe, device, positions)
        trial = None if name in probes else Trial(data, recipe.training, recipe.adapter)
        for seed in seeds:
            key = store.key(item.name, backbone, name, seed)
            if key in store.runs:
                continue
            started, parts = time.perf_counter(), splits(item, seed)
            if trial is None:
                found = _probe(data, parts)
            else:
                found = run_recipe(trial, parts, seed, recipe.members)
            for more, scores in (found.pop("beside", None) or {}).items():
                store.add(store.key(item.name, backbone, f"{name}, {more}", seed), scores)
            store.add(key, {**found, "seconds": round(time.perf_counter() - started, 2)})
            print(f"{key}: {_shown(found)}", flush=True)


def _kind(recipe: Recipe) -> tuple[int, str, str]:
    """Return which features a recipe needs."""
    training = recipe.training
    return training.views, training.augment, str(recipe.adapter.features)


def _features(
    item: ImageSet,
    backbone: str,
    weights: Path,
    recipe: Recipe,
    device: torch.device,
    positions: int | None,
) -> Features:
    found = frozen_backbone(
        backbone,
        item.size,
        weights=weights,
        preprocess=CROP,
        features=recipe.adapter.features,
    )
    samples = [
        Sample(path, int(label), "train")
        for path, label in zip(item.paths, item.labels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder, progress_bars(True) as progress:
        return trial_features(
            found,
            {"train": samples},
            item.classes,
            recipe.training,
            device,
            Path(folder),
            progress,
            positions=positions,
        )


def _probe(data: Features, parts: dict[str, np.ndarray]) -> dict[str, Any]:
    means = torch.as_tensor(data.values[0]).float().mean(1).cpu().numpy()
    found = linear_probe(
        {split: means[places] for split, places in parts.items()},
        {split: data.labels[places] for split, places in parts.items()},
        data.classes,
    )
    keys = ("accuracy", "macro_f1")
    return {split: {k: found[split][k] for k in keys} for split in ("val", "test")}


def trained_run(
    item: ImageSet,
    backbone: str,
    weights: Path,
    seed: int,
    config: TrainConfig,
    adapter: AdaptConfig,
    device: str,
) -> dict[str, Any]:
    """Train one split from the files with the real command's function."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.csv"
        write_csv(data, item, seed)
        results = train(
            data,
            Path(folder) / "run",
            backbone,
            replace(config, seed=seed),
            replace(adapter, input_size=(3, item.size, item.size)),
            preprocess=CROP,
            weights=weights,
            device=device,
        ).results
    found: dict[str, Any] = {s: {k: results[s][k] for k in SHOWN} for s in ("val", "test")}
    found["epoch"] = results["best"]["epoch"]
    found["stage"] = results["best"]["stage"]
    return {**found, "seconds": round(time.perf_counter() - started, 2)}


def full_runs(
    item: ImageSet, backbone: str, weights: Path, seeds: Iterable[int], device: str, store: Store
) -> None:
    """Fine-tune everything with a linear head; validation of the first split chooses the rate."""
    seeds, head = list(seeds), AdaptConfig(adapter="none")
    tried = {}
    for rate in FULL_RATES:
        key = store.key(item.name, backbone, f"{FULL}, rate {rate:g}", seeds[0])
        if key not in store.runs:
            config = full_config(rate, item.name)
            found = trained_run(item, backbone, weights, seeds[0], config, head, device)
            store.add(key, found)
        tried[rate] = store.runs[key]
    rate = max(tried, key=lambda r: (tried[r]["val"]["macro_f1"], -tried[r]["val"]["loss"]))
    for seed in seeds:
        key = store.key(item.name, backbone, FULL, seed)
        if key in store.runs:
            continue
        if seed == seeds[0]:
            found = tried[rate]
        else:
            config = full_config(rate, item.name)
            found = trained_run(item, backbone, weights, seed, config, head, device)
        store.add(key, {**found, "rate": rate})
        print(f"{key}: {_shown(found)}", flush=True)


def best_runs(
    item: ImageSet,
    backbone: str,
    weights: Path,
    kinds: Iterable[str],
    seeds: Iterable[int],
    device: str,
    store: Store,
) -> None:
    """Train everything by the best recipe, with several seeds for each split.

    The store gets a run for each seed, and one for their mean logits.
    """
    for kind in kinds:
        recipe = best_recipe(kind)
        for seed in seeds:
            key = store.key(item.name, backbone, f"{BEST_RECIPE}, {kind}", seed)
            if key in store.runs:
                continue
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / "data.csv"
                write_csv(data, item, seed)
                trained = train_folds(
                    data,
                    Path(folder) / "runs",
                    backbone,
                    recipe.training,
                    replace(recipe.adapter, input_size=(3, item.size, item.size)),
                    FoldSettings(seeds=tuple(range(recipe.members))),
                    preprocess=CROP,
                    weights=weights,
                    device=device,
                )
                results = [read_json(run / RESULTS) for run in trained.runs]
            seconds = round((time.perf_counter() - started) / recipe.members, 2)
            mean = {k: trained.summary["ensemble"]["test"][k] for k in SHOWN[:2]}
            method = f"{BEST_RECIPE}, {kind}, {recipe.members} seeds"
            store.add(store.key(item.name, backbone, method, seed), {"test": mean})
            # The first one last: where it is in the store, so are the others.
            for member, result in reversed(list(enumerate(results))):
                found = {s: {k: result[s][k] for k in SHOWN} for s in ("val", "test")}
                method = f"{BEST_RECIPE}, {kind}" + (f", seed {member}" if member else "")
                found_key = store.key(item.name, backbone, method, seed)
                store.add(found_key, {**found, "seconds": seconds})
                print(f"{found_key}: {_shown(found)}", flush=True)


def _shown(found: dict[str, Any]) -> str:
    return f"validation {found['val']['accuracy']:.4f}, test {found['test']['accuracy']:.4f}"


def accuracies(
    runs: dict[str, dict[str, Any]], item: str, backbone: str, method: str, split: str
) -> dict[int, float]:
    """Return the accuracy of each seed's run on a split."""
    start = f"{item} | {backbone} | {method} | "
    return {
        int(key.removeprefix(start)): run[split]["accuracy"]
        for key, run in runs.items()
        if key.startswith(start)
    }
