"""The folder of a training run: what may be in it, and the state that a run resumes from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastadapt.checkpoint import CONFIG, WEIGHTS, is_own_config
from fastadapt.errors import InputError
from fastadapt.files import (
    is_temporary,
    read_json,
    read_tensors,
    sha256_tensors,
    write_tensors,
    write_text,
)
from fastadapt.locks import LOCK
from fastadapt.train.cache_file import CACHE_NAME, is_cache
from fastadapt.train.request import REQUEST, is_request

STATE = "state.safetensors"
SPLITS = "splits.csv"
LABELS = "labels.txt"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
PREDICTIONS = "predictions.csv"
CURVES, EVALUATION, MISTAKES = "curves.png", "evaluation.png", "mistakes.png"
CACHE = "cache"
STATE_FORMAT = "fastadapt-state"
NUMBERS = (  # of a state, beside its tensors
    "stage",
    "epoch",
    "history",
    "best",
    "scaler",
    "refit",
    "held_out_history",
    "held_out_best",
)
PROFILE = "profile.json"
OURS = {CONFIG, WEIGHTS, STATE, SPLITS, LABELS, METRICS, RESULTS, PREDICTIONS, CURVES, CACHE}
OURS |= {PROFILE, REQUEST, EVALUATION, MISTAKES}


@dataclass
class State:
    """Where a run stands after an epoch.

    Attributes:
        stage, epoch: the last epoch that was completed, both from 1; epoch 0 before the first.
        history: one dictionary per completed epoch, as in ``metrics.jsonl``.
        best: index into ``history`` of the epoch that is kept so far; None before the first.
        model: trained tensors after that epoch.
        best_model: trained tensors of the epoch that is kept.
        optimizer: state of the optimizer, by parameter index and name.
        scaler: state of the gradient scaler (fp16 only).
        average: moving average of the trained parameters after that epoch, where one is kept.
        refit: whether the model trains again, on validation images, too: all of the above is then
            that of the refit.
        held_out: logits [N, K] by split of the model that did not train on them.
        held_out_history, held_out_best: its epochs, and which of them is kept.
    """

    stage: int = 1
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: int | None = None
    model: dict[str, Tensor] = field(default_factory=dict)
    best_model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    refit: bool = False
    held_out: dict[str, Tensor] = field(default_factory=dict)
    held_out_history: list[dict[str, Any]] = field(default_factory=list)
    held_out_best: int | None = None

    def judged(self) -> tuple[list[dict[str, Any]], int]:
        """Return the epochs that validation judged, and which of them it chose."""
        found = self.held_out_history, self.held_out_best
        history, best = found if self.refit else (self.history, self.best)
        assert best is not None  # an epoch was completed
        return history, best


def save_state(state: State, settings: dict[str, Any], path: Path) -> None:
    """Write one safetensors file, whole or not there; numbers are JSON in its metadata."""
    tensors = {f"model.{name}": t for name, t in state.model.items()}
    tensors |= {f"best.{name}": t for name, t in state.best_model.items()}
    tensors |= {f"average.{name}": t for name, t in state.average.items()}
    tensors |= {f"held_out.{name}": t for name, t in state.held_out.items()}
    for index, values in state.optimizer.items():
        tensors |= {f"optimizer.{index}.{name}": t for name, t in values.items()}
    numbers = {key: getattr(state, key) for key in NUMBERS}
    metadata = {"state": json.dumps(numbers), "settings": json.dumps(settings)}
    metadata |= {"format": STATE_FORMAT, "sha256": _hash(tensors, metadata)}
    write_tensors(path, tensors, metadata)


def load_state(path: Path) -> tuple[State, dict[str, Any]]:
    """Read what :func:`save_state` wrote: the state and the settings of its run.

    States of versions before 0.2 have no hash.

    Raises:
        InputError: it is no state, or not what was written.
    """
    tensors, metadata = read_tensors(path)
    stated = metadata.pop("format", None), metadata.pop("sha256", None)
    if stated != (None, None) and stated != (STATE_FORMAT, _hash(tensors, metadata)):
        raise InputError(
            f"{path} is damaged: it is not what the run wrote. Start anew with `overwrite=True`, "
            "or put back an intact copy"
        )
    try:
        state = State(**json.loads(metadata["state"]))
        settings = json.loads(metadata["settings"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path} is no training state that this version can read: start anew with "
            "`overwrite=True`"
        ) from None
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            state.optimizer.setdefault(int(index), {})[key] = tensor
        else:
            kinds = {"model": state.model, "best": state.best_model, "average": state.average}
            kinds["held_out"] = state.held_out
            kinds[kind][rest] = tensor
    return state, settings


def _hash(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Hash all that a state's file holds."""
    text = json.dumps([sha256_tensors(tensors), sorted(metadata.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that a new or resumed run must not write to.

    Raises:
        InputError: ``out`` is a file, holds something else, or a run, without ``resume`` or
            ``overwrite``; there is nothing to resume.
    """
    if resume and overwrite:
        raise InputError("`resume` and `overwrite` exclude each other: give one of them")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; expected a folder")
    ours = is_run(out)
    if not ours:
        check_unused(out)
    if resume:
        if not out.is_dir():
            raise InputError(f"{out} does not exist, so there is no run to resume")
        return
    if overwrite:
        return
    if (out / STATE).exists():
        raise InputError(
            f"{out} holds an unfinished run: continue it with `resume=True`, or replace it with "
            "`overwrite=True`"
        )
    if ours and any((out / name).exists() for name in (CONFIG, METRICS, RESULTS)):
        raise InputError(f"{out} holds a run already: give another `out`, or `overwrite=True`")


def is_run(folder: Path) -> bool:
    """Say whether a folder proves itself a run by the format of its configuration or its state.

    Only then are files with the names of :data:`OURS` a run's own; anything else in the folder is
    somebody else's, and stays as it is.
    """
    return (
        is_own_config(folder / CONFIG)
        or is_request(folder / REQUEST)
        or is_own_state(folder / STATE)
    )


def is_own_state(path: Path) -> bool:
    """Say whether a file is a state that a run saved, by what stands at its beginning."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {"state", "settings"} <= (file.metadata() or {}).keys()
    except (OSError, SafetensorError):
        return False


def check_unused(out: Path) -> None:
    """Refuse a folder that is no run and holds files that no run left there.

    Raises:
        InputError: naming the first of them.
    """
    for path in sorted(out.iterdir()) if out.is_dir() else []:
        cache = path.name == CACHE and path.is_dir() and all(map(_is_of_cache, path.iterdir()))
        if not cache and path.name != LOCK and not is_temporary(path.name, OURS):
            what = "a run already, but none of fastadapt's" if path.name in OURS else "other files"
            raise InputError(
                f"{out} holds {what}, {path.name!r} for one: give a new or empty folder as `out`"
            )


def _is_of_cache(path: Path) -> bool:
    return is_cache(path) or is_temporary(path.name, CACHE_NAME)


def check_settings(now: dict[str, Any], then: dict[str, Any], out: Path) -> None:
    """Compare the settings of a run with those that it was started with.

    Raises:
        InputError: they differ; it names the first setting that does.
    """
    now = json.loads(json.dumps(now))  # tuples to lists, as in the file
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) == then.get(key):
            continue
        if key == "data":
            what = "the data set (files, labels or splits) is not the one"
        elif key == "fingerprint":
            what = "the backbone's weights are not those"
        else:
            what = f"{key} is {now.get(key)!r}, but was {then.get(key)!r}:"
            raise InputError(
                f"{what} resume {out} with the settings that it was started with, or start anew "
                "with `overwrite=True`"
            )
        raise InputError(f"{what} that {out} was started with: start anew with `overwrite=True`")


def finished_results(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the results of a run that is finished; None if ``out`` holds none.

    Raises:
        InputError: it has other settings, and no other run was begun in its place.
    """
    if not (out / RESULTS).is_file() or not (out / CONFIG).is_file():
        return None
    try:
        check_settings(settings, read_json(out / CONFIG).get("train", {}).get("settings", {}), out)
    except InputError:
        if (out / REQUEST).exists():
            return None
        raise
    return read_json(out / RESULTS)


def check_finished(run: Path) -> None:
    """Refuse a folder that is no run, or of one that has not ended: its files may be of two runs.

    Raises:
        InputError: as said.
    """
    if (run / STATE).exists() or (run / REQUEST).exists():
        raise InputError(
            f"{run} holds an unfinished run: resume its training first, then it can be loaded"
        )
    if not (run / CONFIG).is_file():
        what = "a bundle" if (run / "manifest.json").is_file() else "no run"
        raise InputError(
            f"{run} is {what}; expected the folder of a training, with {CONFIG}{meant_run(run)}"
        )


def meant_run(folder: Path) -> str:
    """Return the end of a message that names a run one level below; empty if there is none."""
    runs = sorted(folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
    return f"; did you mean {runs[0].parent}?" if runs else ""


def append_metrics(out: Path, row: dict[str, Any]) -> None:
    """Add an epoch's line to ``metrics.jsonl``."""
    with (out / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_metrics(out: Path, history: list[dict[str, Any]]) -> None:
    """Write ``metrics.jsonl`` anew."""
    write_text(out / METRICS, "".join(json.dumps(row) + "\n" for row in history))


def remove_leftovers(out: Path) -> None:
    """Remove temporary files of a run that was killed while it wrote them, and no others."""
    names: tuple[tuple[Path, Container[str] | re.Pattern[str]], ...]
    names = ((out, OURS), (out / CACHE, CACHE_NAME))
    for folder, of in names:
        for path in folder.glob(".*.tmp"):
            if is_temporary(path.name, of):
                path.unlink(missing_ok=True)


def remove_run(folder: Path) -> None:
    """Remove a run's own files, and the folder if nothing else is in it."""
    if not is_run(folder):
        return
    remove_leftovers(folder)
    for path in (folder / CACHE).glob("*.npy"):
        if is_cache(path):
            path.unlink()
    for name in [*sorted(OURS - {CACHE, CONFIG}), CONFIG]:  # the proof goes last
        (folder / name).unlink(missing_ok=True)
    remove_if_empty(folder)


def remove_if_unused(out: Path) -> None:
    """Remove after a failure what says that a run was begun, if it kept no epoch."""
    if not (out / STATE).exists():
        (out / REQUEST).unlink(missing_ok=True)
        if not (out / CONFIG).exists():  # of a run that was to be replaced
            (out / METRICS).unlink(missing_ok=True)
    remove_if_empty(out)


def remove_if_empty(out: Path) -> None:
    """Remove the folders after a failure, if the run had nothing to put there."""
    with contextlib.suppress(OSError):
        (out / CACHE).rmdir()
    with contextlib.suppress(OSError):
        out.rmdir()
