"""Fit what the ensemble of folds has of its own: a temperature, a threshold and an abstention band.

An image i validates in one run for each seed, and these S runs did not train on it. With z[m, i]
the logits of run m, already divided by its own temperature:

    (1)  z[i] = 1/S Σ_m z[m, i],   over the S runs that i validates in
    (2)  T = argmin -1/N Σ_i log softmax(z[i] / T)[label_i]
    (3)  threshold and band are chosen on softmax(z[i] / T)

The ensemble averages more runs than (1) does, all F·S of them, of which most have trained on i: no
image is left to fit their average on. Without folds every run validates on the same images, and (1)
is the ensemble itself. With one seed (2) gives 1 where every run's own temperature was fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from fastadapt.decision import LIKELIEST, Decision, choose_decision
from fastadapt.errors import InputError
from fastadapt.files import read_json
from fastadapt.train.calibration import calibrate
from fastadapt.train.fold_results import HeldOut, PlannedRun, read_predicted
from fastadapt.train.metrics import SCORES, calibration_error, scores
from fastadapt.train.results import NOT_ASKED, softmax
from fastadapt.train.run_folder import RESULTS

LEAST = 1e-300  # of probabilities, whose logarithm is taken


@dataclass(frozen=True)
class EnsembleFit:
    """What was fitted, as ``folds.json`` and a bundle say it.

    Attributes:
        temperature: by which the mean of the runs' logits is divided.
        decision: how the probabilities become classes.
    """

    temperature: float = 1.0
    decision: Decision = LIKELIEST

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Self:
        """Read what :func:`fit_ensemble` returned.

        Raises:
            InputError: a value cannot be.
        """
        if not isinstance(values, dict):
            raise InputError(f"{where}: the ensemble is {values!r}; expected a JSON object")
        temperature = values.get("temperature", 1.0)
        if type(temperature) not in (int, float) or not 1e-3 <= temperature <= 1e3:
            raise InputError(f"{where}: temperature is {temperature!r}; expected 0.001 to 1000")
        return cls(float(temperature), Decision.from_dict(values.get("decision"), where))


def fit_ensemble(out: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Fit temperature and decision on what the runs predicted for validation, by (1) to (3).

    Args:
        out: the folder of the runs, all of them finished.
        summary: ``folds.json``, with ``runs`` and ``classes``.

    Returns:
        For ``folds.json``: ``temperature``, and in ``note`` why it is kept at 1, where it is;
        ``decision``, ``val`` (images, runs for each, ECE before and after), and ``test`` (scores
        of the ensemble itself) where no run trained on the images of another.
    """
    plan = [PlannedRun(run["folder"], run["fold"], run["seed"]) for run in summary["runs"]]
    classes, first = summary["classes"], out / plan[0].folder / RESULTS
    results = read_json(first)
    asked = Decision.from_dict(results.get("decision"), str(first))
    held, runs = _mean_over_runs(read_predicted(out, plan, classes, "val"))
    logits = _logits(held.probabilities)
    temperature, note = 1.0, NOT_ASKED
    if results.get("calibration", {}).get("note") != NOT_ASKED:
        temperature, note = calibrate(logits, held.labels)
    after = softmax(logits / temperature)
    decision, _ = choose_decision(after, held.labels, asked.criterion, asked.abstain)
    finite = bool(logits.isfinite().all())
    found: dict[str, Any] = {"temperature": temperature}
    if note:
        found["note"] = note
    found["decision"] = decision.to_dict()
    found["val"] = {
        "images": len(held.labels),
        "runs_per_image": runs,
        "ece_before": calibration_error(held.labels, softmax(logits)) if finite else None,
        "ece_after": calibration_error(held.labels, after) if finite else None,
    }
    if summary.get("folds") is None and "test" in results:
        found["test"] = _own_scores(out, plan, classes, temperature, decision)
    return found


def ensemble_of(out: Path, summary: dict[str, Any]) -> EnsembleFit:
    """Return what was fitted when the folds were trained; fit it for folders of older versions.

    Raises:
        InputError: ``folds.json`` holds values that cannot be.
    """
    found = summary["ensemble"] if "ensemble" in summary else fit_ensemble(out, summary)
    return EnsembleFit.from_dict(found, str(out))


def _own_scores(
    out: Path,
    plan: Sequence[PlannedRun],
    classes: Sequence[str],
    temperature: float,
    decision: Decision,
) -> dict[str, Any]:
    """Return the scores of the ensemble on test images that every run has predicted."""
    held, _ = _mean_over_runs(read_predicted(out, plan, classes, "test"))
    probabilities = softmax(_logits(held.probabilities) / temperature)
    found = scores(held.labels, decision.classes(probabilities), probabilities, tuple(classes))
    return {"images": len(held.labels), **{name: found.get(name) for name in SCORES}}


def _mean_over_runs(held: HeldOut) -> tuple[HeldOut, int]:
    """Average each image's logits over the runs that predicted it, by (1).

    Logarithms of probabilities are logits but for a constant, of which a softmax knows nothing.

    Returns:
        Each image once, and how many runs predicted one at least.
    """
    paths, place, counts = np.unique(held.paths, return_inverse=True, return_counts=True)
    sums = np.zeros((len(paths), held.probabilities.shape[1]))
    np.add.at(sums, place, np.log(held.probabilities.clip(LEAST)))
    labels = np.zeros(len(paths), np.int64)
    labels[place] = held.labels
    means = torch.from_numpy(sums / counts[:, None])
    mean = HeldOut(paths.tolist(), labels, means.argmax(1).numpy(), softmax(means))
    return mean, int(counts.min())


def _logits(probabilities: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.log(probabilities.clip(LEAST)))
