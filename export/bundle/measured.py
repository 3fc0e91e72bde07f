"""Which of a bundle's files is fastest on which machine: rows that ``verify --measure`` adds.

The manifest holds the rows of the machine that made the bundle. Rows of others lie beside it in
``measured.json``, which is outside the bundle's hashes and signature, so that it can grow; they
choose only among files that passed the gate. A row counts while its file is the one that was
measured, by its SHA-256.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastadapt.errors import InputError
from fastadapt.files import read_json, write_json
from fastadapt.info import processor
from fastadapt.locks import lock_beside

from ..artefact import VERIFIED, Artefact
from ..runtime import CORE_ML, usable_cores
from .schema import check_rows

MEASURED, FORMAT = "measured.json", "fastadapt-measurements"


def machine(on_gpu: bool) -> str:
    """Name what computes here: the GPU, or the processor with the cores that a runtime takes."""
    if on_gpu:
        return torch.cuda.get_device_name()
    cores = usable_cores()
    return f"{processor()}, {cores} core{'' if cores == 1 else 's'}"


def measured_rows(
    artefacts: Iterable[Artefact], files: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row for each speed that was measured here, of files that are verified.

    Args:
        artefacts: with the speeds.
        files: the manifest's entries, with hashes.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    hashes = _hashes(files)
    return [
        {
            "machine": machine(not on_cpu(runtime)),
            "runtime": runtime,
            "file": artefact.path,
            "sha256": hashes[artefact.path],
            "precision": artefact.precision,
            "batch": int(batch),
            "images_per_second": round(speed, 2),
            "when": now,
        }
        for artefact in artefacts
        if artefact.path is not None and artefact.status == VERIFIED
        for runtime, speeds in artefact.speed.items()
        for batch, speed in speeds.items()
    ]


def on_cpu(runtime: str) -> bool:
    """Say whether a runtime of this name computes on the CPU."""
    return runtime.endswith("CPU") or runtime == CORE_ML  # an Apple processor's name says it all


def read_rows(bundle: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all rows of a bundle whose files are those that were measured.

    Raises:
        InputError: ``measured.json`` is damaged, or no file of this kind.
    """
    hashes = _hashes(manifest["files"])
    rows = [*manifest.get("measured", ()), *_rows_beside(bundle)]
    return [row for row in rows if hashes.get(row["file"]) == row["sha256"]]


def add_rows(bundle: Path, rows: list[dict[str, Any]]) -> None:
    """Put this machine's rows into ``measured.json``, in place of those it had there.

    Raises:
        InputError: as for :func:`read_rows`; or another process writes to the bundle.
    """
    with lock_beside(bundle.resolve()):
        here = {(row["machine"], row["file"]) for row in rows}
        kept = [row for row in _rows_beside(bundle) if (row["machine"], row["file"]) not in here]
        write_json(bundle / MEASURED, {"format": FORMAT, "rows": kept + rows})


def speeds_on(rows: Iterable[dict[str, Any]], name: str) -> dict[str, float]:
    """Return the most images per second of each file on a machine, by the file's name."""
    found: dict[str, float] = {}
    for row in rows:
        if row["machine"] == name:
            found[row["file"]] = max(found.get(row["file"], 0.0), row["images_per_second"])
    return found


def is_measured(file: Path) -> bool:
    """Say whether a file is one of this format's, which may be replaced."""
    try:
        return file.name == MEASURED and read_json(file).get("format") == FORMAT
    except InputError:
        return False


def _hashes(files: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the SHA-256 of each file, and of each folder that of its files' names and hashes."""
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    inside: dict[str, list[str]] = {}
    for name in sorted(files):
        folder, slash, _ = name.partition("/")
        if slash:
            inside.setdefault(folder, []).append(f"{name}\0{hashes[name]}\n")
    for folder, lines in inside.items():
        hashes[folder] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return hashes


def _rows_beside(bundle: Path) -> list[dict[str, Any]]:
    file = bundle / MEASURED
    if not file.exists():
        return []
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise InputError(f"{file} holds no measurements of a bundle: delete it")
    return check_rows(content.get("rows"), str(file))
