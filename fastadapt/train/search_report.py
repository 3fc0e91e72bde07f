"""Show what a search found: a table of all trials, what mattered, and a picture."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastadapt.files import write_text
from fastadapt.train.search_trials import import_optuna

NEEDED = 8  # trials, for importances
LOST = "its process ended"  # the reason of a trial that could not say one
SHOWN = 5  # trials in the terminal's table


def write_trials(path: Path, trials: Sequence[Any]) -> None:
    """Write a CSV of all trials: number, state, score, folds, seconds and settings.

    Args:
        path: of the CSV, written whole or not at all.
        trials: optuna's.
    """
    names = sorted({name for trial in trials for name in trial.params})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial", "state", "score", "standard_deviation", "folds", "seconds", *names, "reason"]
    )
    for trial in trials:
        scores = trial.user_attrs.get("scores", [])
        mean = f"{np.mean(scores):.6f}" if scores else ""
        spread = f"{np.std(scores, ddof=1):.6f}" if len(scores) > 1 else ""
        seconds = trial.user_attrs.get("seconds")
        writer.writerow(
            [
                trial.number,
                trial.state.name.lower(),
                mean,
                spread,
                len(scores),
                "" if seconds is None else f"{seconds:.2f}",
                *(_short(trial.params.get(name, "")) for name in names),
                trial.user_attrs.get("reason", LOST if trial.state.name == "FAIL" else ""),
            ]
        )
    write_text(path, text.getvalue())


def counts(trials: Sequence[Any]) -> dict[str, int]:
    """Return how many trials ran to their end, were pruned, and failed."""
    names = {"complete": "ran to their end", "pruned": "pruned", "fail": "failed"}
    found = dict.fromkeys(names.values(), 0)
    for trial in trials:
        state = trial.state.name.lower()
        if state in names:
            found[names[state]] += 1
    return found


def first_fold_scores(trials: Sequence[Any]) -> dict[int, float]:
    """Return the score of the first fold by trial: the same images for all, pruned ones too."""
    return {
        trial.number: trial.user_attrs["scores"][0]
        for trial in trials
        if trial.user_attrs.get("scores")
    }


def importances(trials: Sequence[Any]) -> dict[str, float]:
    """Return each setting's share in the variance of the score of the first fold (fANOVA).

    That fold is the one that all trials have. Empty where too few trials ran.

    Source: Hutter et al. 2014, "An Efficient Approach for Assessing Hyperparameter Importance", as
    optuna has it.
    """
    optuna = import_optuna()
    first = first_fold_scores(trials)
    scored = [trial for trial in trials if trial.number in first]
    # Settings that came in later versions of a study are not in all trials.
    names = set.intersection(*(set(t.params) for t in scored)) if scored else set()
    varied = sorted(n for n in names if len({t.params[n] for t in scored}) > 1)
    if len(scored) < NEEDED or not varied or len(set(first.values())) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trial in scored:
            study.add_trial(
                optuna.trial.create_trial(
                    params={name: trial.params[name] for name in varied},
                    distributions={name: trial.distributions[name] for name in varied},
                    value=first[trial.number],
                )
            )
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )
    return {name: float(share) for name, share in found.items()}


def draw_search(
    path: Path, trials: Sequence[Any], shares: dict[str, float], probe: float, metric: str
) -> None:
    """Draw the trials' scores in their order, what mattered, and the three settings that did most.

    Args:
        path: of the PNG, written whole or not at all.
        trials: optuna's.
        shares: of :func:`importances`.
        probe: the linear probe's score on the same folds.
        metric: what the scores are.
    """
    from matplotlib.figure import Figure

    from fastadapt.train.plots import save_figure

    figure = Figure(figsize=(12, 7.5), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2, 6)
    first = first_fold_scores(trials)
    scored = [trial for trial in trials if trial.number in first]
    history = figure.add_subplot(grid[0, :3])
    for state, marker, label in (("PRUNED", "x", "pruned"), ("COMPLETE", "o", "all folds")):
        chosen = [trial for trial in scored if trial.state.name == state]
        means = [float(np.mean(trial.user_attrs["scores"])) for trial in chosen]
        history.scatter([t.number for t in chosen], means, s=18, marker=marker, label=label)
    history.axhline(probe, color="0.3", linestyle="--", linewidth=1, label="linear probe")
    history.set(xlabel="trial", ylabel=f"mean {metric} of its folds")
    history.legend()
    bars = figure.add_subplot(grid[0, 3:])
    names = list(shares)[::-1]
    bars.barh(names, [shares[name] for name in names], color="tab:blue")
    bars.set(xlabel="share of the variance of the first fold's score", title="what mattered")
    for place, name in enumerate(list(shares)[:3]):
        axes = figure.add_subplot(grid[1, 2 * place : 2 * place + 2])
        values = [trial.params[name] for trial in scored]
        numbers = all(isinstance(value, int | float) for value in values)
        axes.scatter(
            values if numbers else [str(value) for value in values],
            [first[trial.number] for trial in scored],
            s=14,
        )
        if numbers and min(values) > 0 and max(values) / min(values) > 20:
            axes.set_xscale("log")
        axes.set(xlabel=name, ylabel=f"{metric}, first fold" if place == 0 else "")
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def trials_table(trials: Sequence[Any], probe: float, metric: str) -> Any:
    """Return the best trials, the first ones and the probe as a table, for the terminal."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("", metric, "±", "settings"):
        table.add_column(name, justify="right" if name in (metric, "±") else "left")
    whole = [trial for trial in trials if trial.state.name == "COMPLETE"]
    best = sorted(whole, key=lambda trial: -trial.value)[:SHOWN]
    first = [trial for trial in whole if trial.number < 2 and trial not in best]
    for trial in [*best, *first]:
        scores = trial.user_attrs["scores"]
        what = ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items())
        table.add_row(
            f"trial {trial.number}", f"{trial.value:.4f}", f"{np.std(scores, ddof=1):.4f}", what
        )
    table.add_row("linear probe", f"{probe:.4f}", "", "logistic regression, on the same folds")
    return table


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
