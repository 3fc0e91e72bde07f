"""Block sizes that measurements chose.

Without them every launch follows a rule: nothing is measured in a training loop. ``fastadapt bench
--tune`` measures on request and keeps its choices in a file, by GPU, operation and size.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch


def path() -> Path:
    """Return where choices are kept: $FASTADAPT_TUNING, else fastadapt/tuning.json in the cache."""
    named = os.environ.get("FASTADAPT_TUNING")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastadapt" / "tuning.json"


def key(operation: str, device: int, sizes: tuple[int, ...]) -> str:
    """Name a choice by GPU, operation and sizes."""
    return " ".join([torch.cuda.get_device_name(device), operation, "x".join(map(str, sizes))])


@contextlib.contextmanager
def forced(choices: dict[str, dict[str, int]]) -> Iterator[None]:
    """Have these choices hold, and no others, within the context: how they are measured."""
    global _forced
    before, _forced = _forced, choices
    try:
        yield
    finally:
        _forced = before


_forced: dict[str, dict[str, int]] | None = None


def chosen(operation: str, device: int, sizes: tuple[int, ...]) -> dict[str, int]:
    """Return the choice for a call of these sizes; empty where nobody has tuned."""
    choices = read() if _forced is None else _forced
    return choices.get(key(operation, device, sizes), {}) if choices else {}


@functools.cache
def read() -> dict[str, dict[str, int]]:
    """Read all choices, once; a file that is broken is named in a warning and passed over."""
    file = path()
    try:
        choices = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        choices = error
    if not isinstance(choices, dict):
        warnings.warn(
            f"{file} holds no tuned launch configurations ({choices}). The defaults are used; "
            "delete it, or tune again with `fastadapt bench --tune`.",
            stacklevel=2,
        )
        return {}
    return choices
