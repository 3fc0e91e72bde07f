"""``manifest.json``: what a bundle records of itself, and whether its files match the record."""

from __future__ import annotations

import platform
from pathlib import Path, PurePosixPath
from typing import Any

from fastadapt.errors import InputError
from fastadapt.files import CONTENT, content_sha256, read_json, sha256_file
from fastadapt.info import devices, gpus, versions
from fastadapt.written_folders import BUNDLE

from ..artefact import FOLDERS, NATIVE
from ..tasks import named_tasks
from .measured import MEASURED
from .schema import check_manifest

FORMAT = BUNDLE
# The newest, the first with tasks that have names, and the first with a hash of itself.
SCHEMA, TASKS, SEALED = 5, 4, 3  # see schema.py
MANIFEST, MODEL, GOLDEN, LABELS = "manifest.json", "model.onnx", "golden.safetensors", "labels.txt"
REPORT = "report.html"
SIGNATURE = "signature.json"  # of a maker, over all other files
LARGEST_MANIFEST = 256 << 20  # bytes

RUNS_ON = (
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "executorch",
    "ai-edge-litert",
    "coremltools",
    "torch",
    "timm",
    "pillow",
)
_MEANT = "copy the bundle again"


def read_manifest(bundle: str | Path) -> dict[str, Any]:
    """Read a bundle's manifest, of any schema up to this version's, in the newest one's form.

    Raises:
        InputError: the folder is no bundle, or one that this version cannot read; a value is
            missing or cannot be; the content is not what the manifest's own hash says.
    """
    file = Path(bundle) / MANIFEST
    if not file.is_file():
        place = file.parent
        missing = "is a file, not a folder" if place.exists() else "is not there"
        what = f"has no {MANIFEST}" if place.is_dir() else missing
        raise InputError(f"{bundle} is no bundle: it {what}. fastadapt export RUN makes one.")
    if file.stat().st_size > LARGEST_MANIFEST:
        raise InputError(f"{file} is larger than any manifest: {_MEANT}")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{file} is no manifest of a fastadapt bundle")
    schema = manifest.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or not 1 <= schema <= SCHEMA:
        raise InputError(
            f"{bundle} was written by a newer fastadapt (schema {schema}, this one reads up to "
            f"{SCHEMA}): update fastadapt"
        )
    if schema >= SEALED and manifest.get(CONTENT) != content_sha256(manifest):
        raise InputError(
            f"{file} was changed: its content is not what its {CONTENT} says. Copy the bundle "
            "again."
        )
    if schema == 1:
        manifest = _from_schema_1(manifest)
    check_manifest(manifest, str(file))
    return manifest


def label_files(manifest: dict[str, Any]) -> dict[str, list[str]]:
    """Return the class names that each file of them holds: one file, or one for each task."""
    tasks = named_tasks(manifest)
    if not tasks:
        return {LABELS: manifest["labels"]}
    return {labels_name(task["name"]): task["labels"] for task in tasks}


def labels_name(task: str) -> str:
    """Return the name of the file of a task's class names."""
    stem, _, suffix = LABELS.rpartition(".")
    return f"{stem}.{task}.{suffix}"


def check_accepted(bundle: str | Path, manifest: dict[str, Any]) -> None:
    """Raise InputError if the bundle was rejected when it was made."""
    if not manifest["accepted"]:
        reason = next(iter(manifest["problems"]), "no reason is recorded")
        raise InputError(f"{bundle} was rejected when it was made: {reason}")


def check_files(bundle: str | Path, manifest: dict[str, Any], *, hashes: bool = True) -> None:
    """Raise InputError naming the first file that is missing, truncated, changed or a link.

    Args:
        bundle: the folder.
        manifest: of the bundle.
        hashes: compare sizes and hashes; else only that files that run are listed, are there, and
            lie in the folder.
    """
    bundle = Path(bundle)
    for name, recorded in manifest["files"].items():
        file = bundle / name
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or ":" in parts[0]:
            raise InputError(f"{bundle / MANIFEST} lists {name!r}, outside the bundle: {_MEANT}")
        if any((bundle / Path(*parts[:n])).is_symlink() for n in range(1, len(parts) + 1)):
            raise InputError(f"{file} is a link; a bundle's files are in its folder: {_MEANT}")
        if not file.is_file():
            raise InputError(f"{file} is missing: {_MEANT}")
        if not hashes:
            continue
        size = file.stat().st_size
        if size != recorded["bytes"]:
            raise InputError(
                f"{file} has {size} bytes, the manifest says {recorded['bytes']}: it was truncated "
                "or changed. Copy the bundle again."
            )
        if sha256_file(file) != recorded["sha256"]:
            raise InputError(
                f"{file} was changed: its SHA-256 is not the manifest's. Copy the bundle again."
            )
    needed = dict.fromkeys((MODEL, GOLDEN))
    for artefact in manifest["artefacts"]:
        if artefact["path"] is not None:
            needed |= dict.fromkeys(artefact.get("files", ()))
            if artefact["kind"] not in FOLDERS:
                needed[artefact["path"]] = None
            if artefact["kind"] == "openvino":  # its weights
                needed[str(PurePosixPath(artefact["path"]).with_suffix(".bin"))] = None
            elif artefact["kind"] in (
                *NATIVE,
                "fastadapt",
            ):  # what loads it reads the file beside it
                needed[f"{artefact['path']}.json"] = None
    for name in needed:
        if name not in manifest["files"]:
            raise InputError(f"{bundle / MANIFEST} lists no {name}: {_MEANT}")


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of a bundle's files, by name.

    Not of the manifest, and of what is written after it: signature, speeds of other machines.
    """
    return {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file not in (folder / MANIFEST, folder / SIGNATURE, folder / MEASURED)
    }


def environment() -> dict[str, Any]:
    """Describe the machine and the versions that a bundle is made with, or verified on."""
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "devices": devices(),
        "gpus": gpus(),
    }


def version_changes(manifest: dict[str, Any]) -> list[str]:
    """List packages of other versions than the bundle was made with, among those it runs on."""
    made = manifest.get("environment", {}).get("versions", {})
    here = versions()
    return [
        f"{name} {made[name]} made it, {here[name]} is here"
        for name in RUNS_ON
        if name in made and name in here and made[name] != here[name]
    ]


def _from_schema_1(manifest: dict[str, Any]) -> dict[str, Any]:
    model = manifest.get("model", {})
    onnx = {"kind": "onnx", "path": MODEL, "precision": "fp32", "status": "verified"}
    return {
        **manifest,
        "model": model,
        "environment": {"versions": manifest.get("versions", {})},
        "artefacts": [{**onnx, "files": [MODEL], "parity": manifest.get("parity", [])}],
    }
