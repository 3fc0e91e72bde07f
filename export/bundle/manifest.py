"""``manifest.json``: what a bundle records of itself, and whether its files match the record."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from fastadapt.errors import InputError
from fastadapt.files import read_json, sha256_file
from fastadapt.info import devices, gpus, versions

FORMAT = "fastadapt-bundle"
# 1: float input, model.onnx alone. 2: uint8 input, artefacts, environment, speed.
SCHEMA = 2
MANIFEST, MODEL, GOLDEN, LABELS = "manifest.json", "model.onnx", "golden.safetensors", "labels.txt"
REPORT = "report.html"

RUNS_ON = (
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "timm",
    "pillow",
)
_KEYS = {
    "files": dict,
    "labels": list,
    "model": dict,
    "preprocessing": dict,
    "accepted": bool,
    "problems": list,
    "artefacts": list,
}
_MEANT = "copy the bundle again"


def read_manifest(bundle: str | Path) -> dict[str, Any]:
    """Read a bundle's manifest, of any schema up to this version's, in the newest one's form.

    Raises:
        InputError: the folder is no bundle, or one that this version cannot read.
    """
    file = Path(bundle) / MANIFEST
    if not file.is_file():
        what = f"has no {MANIFEST}" if file.parent.is_dir() else "is not there"
        raise InputError(f"{bundle} is no bundle: it {what}. fastadapt export RUN makes one.")
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise InputError(f"{file} is no manifest of a fastadapt bundle")
    schema = manifest.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise InputError(
            f"{bundle} was written by a newer fastadapt (schema {schema}, this one reads up to "
            f"{SCHEMA}): update fastadapt"
        )
    if schema == 1:
        manifest = _from_schema_1(manifest)
    for key, kind in _KEYS.items():
        if key not in manifest:
            raise InputError(f"{file} lacks the key {key!r}: {_MEANT}")
        if not isinstance(manifest[key], kind):
            raise InputError(
                f"{file}: {key!r} is a {type(manifest[key]).__name__}, expected a "
                f"{kind.__name__}: {_MEANT}"
            )
    if not isinstance(manifest["model"].get("inputs"), list):
        raise InputError(f"{file} lacks the model's 'inputs': {_MEANT}")
    for row in manifest["artefacts"]:
        for key in ("kind", "path", "precision", "status"):
            if not isinstance(row, dict) or key not in row:
                raise InputError(f"{file} lists a file to run without its {key!r}: {_MEANT}")
    return manifest


def check_accepted(bundle: str | Path, manifest: dict[str, Any]) -> None:
    """Raise InputError if the bundle was rejected when it was made."""
    if not manifest["accepted"]:
        reason = next(iter(manifest["problems"]), "no reason is recorded")
        raise InputError(f"{bundle} was rejected when it was made: {reason}")


def check_files(bundle: str | Path, manifest: dict[str, Any]) -> None:
    """Raise InputError naming the first file that is missing, truncated or changed."""
    bundle = Path(bundle)
    for name, recorded in manifest["files"].items():
        file = bundle / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{bundle / MANIFEST} lists {name!r}, outside the bundle: {_MEANT}")
        if not isinstance(recorded, dict) or not {"bytes", "sha256"} <= recorded.keys():
            raise InputError(f"{bundle / MANIFEST} has no size and hash of {name!r}: {_MEANT}")
        if not file.is_file():
            raise InputError(f"{file} is missing: {_MEANT}")
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
    for name in (MODEL, GOLDEN):
        if name not in manifest["files"]:
            raise InputError(f"{bundle / MANIFEST} lists no {name}: {_MEANT}")


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file of a bundle but its manifest, by name."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
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
