"""Train an adapter in stages: from labelled images to a run folder."""

import importlib

from fastadapt.train.config import TrainConfig

_WHERE = {"TrainResult": "results", "summary_table": "results", "train": "run"}
__all__ = ["TrainConfig", "TrainResult", "summary_table", "train"]


def __getattr__(name: str):
    # Training draws and reads images: a program that only names settings does not wait for that.
    if name in _WHERE:
        return getattr(importlib.import_module(f"fastadapt.train.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'fastadapt.train' has no attribute {name!r}")
