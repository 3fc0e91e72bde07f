"""Decide which epoch of a run is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastadapt.train.config import TrainConfig
from fastadapt.train.run_folder import State


def better(history: Sequence[dict[str, Any]], one: int, other: int, config: TrainConfig) -> bool:
    """Return whether an epoch is kept rather than another one.

    Args:
        history: one dictionary per epoch, with the validation metrics.
        one: place of an epoch.
        other: place of the epoch that was kept so far.
        config: says by which metric, and what tells equal epochs apart.
    """
    return _rank(history, one, config) > _rank(history, other, config)


def stalled(state: State, config: TrainConfig) -> bool:
    """Return whether the stage had ``patience`` epochs without improvement."""
    if config.patience is None or state.best is None or state.refit:
        return False
    return min(len(state.history) - 1 - state.best, state.epoch) >= config.patience


def _rank(history: Sequence[dict[str, Any]], index: int, config: TrainConfig) -> tuple[float, ...]:
    epoch, sign = history[index], -1 if config.select == "loss" else 1
    # Counts of a small validation split are often equal: the loss tells such epochs apart.
    tie = index if config.ties == "later" else -epoch["val_loss"]
    return sign * epoch[f"val_{config.select}"], tie
