"""Run the trials of a search; :mod:`fastadapt.train.search_processes` spreads them.

optuna draws the settings and ends trials whose first folds are worse than those of others
(successive halving over folds: of the trials that have 1 fold, the best third goes on to 3, and of
those the best third to all). The journal is a file in the folder, so that a search can be
interrupted and resumed, and that processes share it.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastadapt.errors import InputError
from fastadapt.locks import FileLock
from fastadapt.train.search_config import SearchConfig
from fastadapt.train.search_space import Space
from fastadapt.train.trials import Features, Trial, score_of

JOURNAL = "journal.log"
STUDY = "fastadapt"
KEEPS_UP = "keeps_up"  # attribute of trials that are never pruned
REDUCTION = 3  # of successive halving


@dataclass(frozen=True)
class Task:
    """What every process of a search needs.

    Attributes:
        folder: of the search; holds the journal.
        space: what is varied.
        search: how.
        features: by backbone.
        folds: [n], the fold of every image.
        seed: of the parameters and of what is drawn.
        deadline: in seconds of the clock; ``None`` for none.
    """

    folder: Path
    space: Space
    search: SearchConfig
    features: dict[str, Features]
    folds: np.ndarray
    seed: int
    deadline: float | None = None


def import_optuna() -> Any:
    """Return optuna, without its lines of progress.

    Raises:
        InputError: it is not installed.
    """
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        raise InputError(
            "search needs optuna, which is not installed: pip install 'fastadapt[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_study(task: Task, number: int = 0) -> Any:
    """Return the study in the task's folder, new or as it stands.

    Args:
        task: of the search.
        number: of the process, so that each draws other settings.
    """
    import warnings

    optuna = import_optuna()
    journal = task.folder / JOURNAL
    lock = None
    # optuna's own lock outlives a process that is killed, and holds the others up for 30 seconds.
    with contextlib.suppress(OSError):
        lock = FileLock(journal)
    backend = optuna.storages.journal.JournalFileBackend(str(journal), lock)
    pruner = optuna.pruners.NopPruner()
    if task.search.prune:
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=1, reduction_factor=REDUCTION, min_early_stopping_rate=0
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is called experimental
        sampler = optuna.samplers.TPESampler(
            multivariate=True, constant_liar=True, n_startup_trials=15, seed=task.seed + number
        )
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=STUDY,
            direction="maximize",
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )


def begin(task: Task) -> int:
    """Put the first settings into a new study, end trials that a kill left; return what is left.

    Returns:
        The number of trials to run.
    """
    optuna = import_optuna()
    study = open_study(task)
    states = optuna.trial.TrialState
    end_running(study)
    if not study.get_trials(deepcopy=False):
        for drawn in task.space.first():
            study.enqueue_trial(drawn, user_attrs={KEEPS_UP: True})
    ended = (states.COMPLETE, states.PRUNED)
    return max(0, task.search.trials - len(study.get_trials(deepcopy=False, states=ended)))


def end_running(study: Any) -> None:
    """Call trials failed that no process works on any more; none of the search may run."""
    states = import_optuna().trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)


def run_one(study: Any, task: Task) -> dict[str, Any]:
    """Draw settings, train and judge them fold by fold, and write the outcome to the journal.

    Returns:
        The trial's number, state, score (``None`` if it failed), folds and seconds.
    """
    optuna = import_optuna()
    states = optuna.trial.TrialState
    trial = study.ask()
    drawn = task.space.suggest(trial)
    started, scores, state = time.perf_counter(), list[float](), states.COMPLETE
    try:
        runner = trial_of(task, drawn)
        for fold in range(task.search.folds):
            scores.append(fold_score(runner, task, task.folds, fold))
            trial.report(float(np.mean(scores)), fold + 1)
            keeps_up = trial.user_attrs.get(KEEPS_UP, False)
            if fold + 1 < task.search.folds and not keeps_up and trial.should_prune():
                state = states.PRUNED
                break
    except (InputError, torch.OutOfMemoryError) as error:
        state = states.FAIL
        trial.set_user_attr("reason", str(error).splitlines()[0])
    seconds = time.perf_counter() - started
    trial.set_user_attr("scores", scores)
    trial.set_user_attr("seconds", seconds)
    value = float(np.mean(scores)) if scores and state != states.FAIL else None
    # optuna takes a pruned trial's last report for its value.
    study.tell(trial, value if state == states.COMPLETE else None, state=state)
    return {
        "number": trial.number,
        "state": state.name.lower(),
        "score": value,
        "folds": len(scores),
        "seconds": seconds,
    }


def trial_of(task: Task, drawn: dict[str, Any]) -> Trial:
    """Return the trial of drawn settings."""
    config, adapt_config = task.space.settings(drawn)
    name = drawn.get("backbone", next(iter(task.features)))
    return Trial(task.features[str(name)], config, adapt_config)


def fold_score(runner: Trial, task: Task, folds: np.ndarray, fold: int) -> float:
    """Train on the other folds, and score this one."""
    held_out = np.flatnonzero(folds == fold)
    logits = runner.run(np.flatnonzero(folds != fold), held_out, task.seed + fold)
    features = runner.features
    labels, metric = features.labels[held_out], runner.config.select
    return score_of(logits, labels, features.classes, metric)
