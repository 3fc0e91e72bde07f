"""Tell the folders that this package writes, runs and bundles, by what stands in their files."""

from __future__ import annotations

import json
import os
from pathlib import Path

BUNDLE = "fastadapt-bundle"  # the format of a bundle's manifest
_NAMED = ("config.json", "manifest.json", "run.json", "folds.json", "settings.json")

# The files of runs, of folds and of searches (a test holds the list to theirs).
RUN_FILES = frozenset(
    (
        *("adapter.safetensors", "cache", "config.json", "curves.png", "evaluation.png"),
        *("labels.txt", "metrics.jsonl", "mistakes.png", "predictions.csv", "profile.json"),
        *("results.json", "run.json", "splits.csv", "state.safetensors"),
        *("folds.csv", "folds.json"),
        *("journal.log", "run", "search.json", "search.png", "settings.json", "trials.csv"),
    )
)


def is_ours(folder: Path) -> bool:
    """Say whether this package wrote the folder: a run, finished or not, runs, or a bundle."""
    # Of a folder that nobody may enter, pathlib's is_file() would raise PermissionError.
    if all(os.path.isfile(folder / name) for name in ("state.safetensors", "metrics.jsonl")):  # noqa: PTH113
        return True
    return any(_format_of(folder / name).startswith("fastadapt-") for name in _NAMED)


def is_bundle(folder: Path) -> bool:
    """Say whether the folder is a bundle, accepted or not."""
    return _format_of(folder / "manifest.json") == BUNDLE


def _format_of(file: Path) -> str:
    """Return the format that a JSON file says it has; empty if it says none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(value.get("format", "")) if isinstance(value, dict) else ""
