"""What the ensemble of folds has of its own, fitted on images that its runs did not train on."""

import csv

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from fastadapt.decision import Decision
from fastadapt.errors import InputError
from fastadapt.files import write_json
from fastadapt.train.ensemble_fit import EnsembleFit, ensemble_of, fit_ensemble

CLASSES = ["bad", "good"]


def write_runs(folder, split_of, seeds, note=None):
    """Write what runs predict: logits with noise of their own, of 60 images."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    truth = rng.normal(size=60) + np.where(labels == 1, 1.0, -1.0)
    runs, logits = [], {}
    for fold in split_of:
        for seed in range(seeds):
            name = f"fold-{fold}-seed-{seed}"
            runs.append({"folder": name, "fold": fold, "seed": seed})
            (folder / name).mkdir(parents=True)
            calibration = {"temperature": 1.0} | ({} if note is None else {"note": note})
            decision = Decision("balanced_accuracy", 0.5, 0.1).to_dict()
            results = {"decision": decision, "calibration": calibration, "test": {}, "val": {}}
            write_json(folder / name / "results.json", results)
            z = np.stack([np.zeros(60), 2 * truth + 6 * rng.normal(size=60)], 1)
            logits[name] = z
            with (folder / name / "predictions.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                columns = ["path", "split", "target", "prediction"]
                writer.writerow([*columns, *(f"probability_{c}" for c in CLASSES)])
                p = torch.softmax(torch.from_numpy(z), 1).numpy()
                for split, images in split_of[fold].items():
                    for i in images:
                        values = [f"{v:.6g}" for v in p[i]]
                        writer.writerow([f"{i}.png", split, CLASSES[labels[i]], "", *values])
    return {"runs": runs, "classes": CLASSES, "folds": len(split_of)}, logits, labels


def nll(temperature, z, labels):
    return float(np.logaddexp(0, -np.where(labels == 1, z, -z) / temperature).mean())


def test_it_is_fitted_on_means_over_seeds_of_each_image(tmp_path):
    images = np.arange(60)
    folds = {
        k: {"val": images[images % 3 == k % 3], "test": images[images % 3 == (k - 1) % 3]}
        for k in (1, 2, 3)
    }
    summary, logits, labels = write_runs(tmp_path, folds, seeds=3)
    found = fit_ensemble(tmp_path, summary)
    mean = np.zeros(60)
    for k, splits in folds.items():
        for i in splits["val"]:
            mean[i] = np.mean([logits[f"fold-{k}-seed-{s}"][i, 1] for s in range(3)])
    best = minimize_scalar(nll, (0.5, 3), args=(mean, labels)).x
    assert found["temperature"] == pytest.approx(best, rel=1e-3) and abs(best - 1) > 0.1
    assert found["val"]["images"] == 60 and found["val"]["runs_per_image"] == 3
    assert found["val"]["ece_after"] is not None and "test" not in found and "note" not in found
    # The band is of the ensemble's own probabilities: 6 of 60 images lie in it.
    p = 1 / (1 + np.exp(-mean / found["temperature"]))
    low, high = found["decision"]["band"]
    assert ((p > low) & (p < high)).sum() == 6
    assert low < found["decision"]["threshold"] < high
    # Folders of older versions have no such entry; a stored one is taken as it is.
    assert ensemble_of(tmp_path, summary).temperature == found["temperature"]
    stored = ensemble_of(tmp_path, summary | {"ensemble": found | {"temperature": 2.0}})
    assert stored == EnsembleFit(2.0, Decision.from_dict(found["decision"], ""))
    for wrong in (0, "1", None, 1e9):
        with pytest.raises(InputError, match=r"temperature is .*; expected 0\.001 to 1000"):
            ensemble_of(tmp_path, summary | {"ensemble": {"temperature": wrong}})


def test_seeds_alone_judge_the_ensemble_itself(tmp_path):
    splits = {"val": np.arange(30), "test": np.arange(30, 60)}
    summary, logits, labels = write_runs(tmp_path, {1: splits}, seeds=2, note="not asked for")
    found = fit_ensemble(tmp_path, summary | {"folds": None})
    assert found["temperature"] == 1 and found["note"] == "not asked for"
    mean = np.mean([z[30:, 1] for z in logits.values()], 0)
    p, threshold = 1 / (1 + np.exp(-mean)), found["decision"]["threshold"]
    assert found["test"]["images"] == 30
    assert found["test"]["accuracy"] == ((p > threshold) == labels[30:]).mean()
