"""Train an adapter in stages: from labelled images to a run folder."""

import importlib

from fastadapt.train.config import TrainConfig
from fastadapt.train.fold_settings import FoldSettings

_WHERE = {
    "FoldEnsemble": "ensemble",
    "FoldsResult": "fold_results",
    "load_folds": "ensemble",
    "TrainResult": "results",
    "folds_table": "fold_results",
    "summary_table": "results",
    "train": "run",
    "train_folds": "cross_validation",
}
__all__ = [
    "FoldEnsemble",
    "FoldSettings",
    "FoldsResult",
    "TrainConfig",
    "TrainResult",
    "folds_table",
    "load_folds",
    "summary_table",
    "train",
    "train_folds",
]


def __getattr__(name: str):
    # Training draws and reads images: a program that only names settings does not wait for that.
    if name in _WHERE:
        return getattr(importlib.import_module(f"fastadapt.train.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'fastadapt.train' has no attribute {name!r}")
