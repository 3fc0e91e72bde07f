"""NVIDIA Triton Inference Server: a bundle as a model of a model repository.

A model's folder has a file that says which of its files were written here, ``fastadapt.json``.
Models without it are never touched. To one with it a bundle is added as the next version, if its
configuration is the same; a model of another configuration is replaced, if that is asked for and
nothing else lies in its folder.

The layout and ``config.pbtxt`` are documented in Triton's "Model Repository" and "Model
Configuration"; the schema is ``model_config.proto`` of triton-inference-server/common.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

from fastadapt.errors import InputError
from fastadapt.files import read_json, write_json, write_text
from fastadapt.locks import lock_beside
from fastadapt.output_place import check_output

from . import triton_python
from .artefact import VERIFIED, Artefact
from .bundle.consistency import check_consistency
from .bundle.manifest import MODEL, check_accepted, check_files, label_files, read_manifest
from .bundle.staging import check_nothing_else, place, staging
from .graph_input import GraphInput

CONFIG, MARKER = "config.pbtxt", "fastadapt.json"
FORMAT = "fastadapt-triton-model"
TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}
BACKENDS = {
    "onnxruntime": {"platform": "onnxruntime_onnx", "file": "model.onnx"},
    "tensorrt": {"platform": "tensorrt_plan", "file": "model.plan"},
    "python": {"backend": "python", "file": "model.py"},
}
MAX_BATCH = 32
# Time that a request waits for others to share its batch; less than a batch takes on most GPUs.
QUEUE_DELAY = 500  # microseconds


def check_repository(repository: str | Path, bundle: str | Path) -> Path:
    """Return the folder that a bundle's model will have in a repository.

    Raises:
        InputError: the repository is a file or cannot be written, or holds a model of that name
            that was not written here.
    """
    check_output(repository, "folder", "a model repository", "repository")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(bundle).absolute().name)
    target = Path(repository) / name
    if target.is_symlink():
        raise InputError(f"{target} is a link: choose another `repository`")
    check_output(target, "replaced folder", "a model", "repository")
    if target.exists() and _marker(target) is None:
        what = "is no Triton model" if not (target / CONFIG).is_file() else "was not written here"
        raise InputError(f"{target} exists and {what}: choose another `repository`")
    return target


def write_repository(
    bundle: str | Path,
    repository: str | Path,
    *,
    backend: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Add a bundle's model to a model repository: ``NAME/config.pbtxt``, ``NAME/1/model.*``.

    Where the model is there, written by this function from a bundle with the same inputs, outputs
    and settings, the bundle becomes its next version, ``NAME/2`` and so on; Triton serves the
    newest, and older ones stay to go back to. What was edited in ``config.pbtxt`` stays.

    Requests are batched dynamically, the warm-up runs the smallest and the largest batch, and
    class names come with Triton's classification extension.

    Args:
        bundle: a folder, whose name becomes the model's.
        repository: a folder, made if need be.
        backend: ``"onnxruntime"``, ``"tensorrt"`` or ``"python"`` (the whole bundle, with a module
            that loads it); if ``None``, TensorRT where the bundle holds an engine that was
            verified, else ONNX Runtime. (TensorRT-RTX is no back end of Triton's.)
        overwrite: replace a model of that name, with all of its versions, whose configuration
            differs.

    Returns:
        The model's folder.

    Raises:
        InputError: the bundle is damaged or rejected, or holds nothing for that back end; a model
            of that name is there and was not written here, or differs.
    """
    bundle = Path(bundle)
    target = check_repository(repository, bundle)
    manifest = read_manifest(bundle)
    check_accepted(bundle, manifest)
    check_files(bundle, manifest)
    check_consistency(bundle, manifest)
    backend, artefact = _choose(bundle, manifest, backend)
    config = to_pbtxt(model_config(target.name, manifest, backend, artefact))
    labels = {name: named for name, named in label_files(manifest).items() if named}
    made_of = hashlib.sha256(json.dumps([config, _hashed(labels)]).encode()).hexdigest()
    with lock_beside(target):
        check_repository(repository, bundle)
        before = _marker(target)
        if before is not None and before["made_of"] == made_of:
            _add_version(target, before, bundle, backend, artefact)
            return target
        if before is not None:
            _check_replaced(target, before, overwrite)
        with staging(target) as folder:
            files = [
                f"1/{file}" for file in _write_version(folder / "1", bundle, backend, artefact)
            ]
            for name in labels:
                shutil.copyfile(bundle / name, folder / name)
            write_text(folder / CONFIG, config)
            others = [CONFIG, *labels]
            _write_marker(folder, made_of, [*others, *files])
            place(folder, target)
    return target


def _hashed(labels: dict[str, list[str]]) -> Any:
    """Return what a model's hash covers of its class names, one model's as they always were."""
    if not labels:
        return []
    return labels if len(labels) > 1 else next(iter(labels.values()))


def _marker(model: Path) -> dict[str, Any] | None:
    """Return what a model's folder says of who wrote it; None if it was not written here."""
    try:
        found = read_json(model / MARKER)
    except InputError:
        return None
    ours = found.get("format") == FORMAT and isinstance(found.get("made_of"), str)
    files = found.get("files")
    known = isinstance(files, list) and all(isinstance(file, str) for file in files)
    return found if ours and known else None


def _write_marker(model: Path, made_of: str, files: list[str]) -> None:
    values = {"format": FORMAT, "version": 1, "made_of": made_of, "files": sorted(files)}
    write_json(model / MARKER, values)


def _check_replaced(target: Path, before: dict[str, Any], overwrite: bool) -> None:
    """Refuse to replace a model of another configuration, unless all of it was written here."""
    if not overwrite:
        raise InputError(
            f"{target} exists, with another configuration or other classes than this bundle's: "
            "replace it with `overwrite=True`, or choose another `repository`"
        )
    check_nothing_else(target, {MARKER, *before["files"]})


def _add_version(
    target: Path, before: dict[str, Any], bundle: Path, backend: str, artefact: Artefact
) -> None:
    """Add the next version; Triton reads only folders whose names are numbers."""
    versions = [int(p.name) for p in target.iterdir() if re.fullmatch(r"[1-9][0-9]{0,8}", p.name)]
    version = str(max(versions, default=0) + 1)
    temporary = target / f".fastadapt-{version}.tmp"
    if temporary.exists():
        shutil.rmtree(temporary)  # of a killed command: the lock is held
    try:
        files = [
            f"{version}/{file}" for file in _write_version(temporary, bundle, backend, artefact)
        ]
        _write_marker(target, before["made_of"], [*before["files"], *files])
        temporary.rename(target / version)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_version(folder: Path, bundle: Path, backend: str, artefact: Artefact) -> list[str]:
    """Write a version's files; return their names."""
    if backend == "python":
        return triton_python.write_version(folder, bundle)
    folder.mkdir()
    for name in artefact.files or (MODEL,):
        if name == artefact.path:
            shutil.copyfile(bundle / name, folder / BACKENDS[backend]["file"])
        elif name.endswith(".data"):  # the graph refers to its weights by their name
            shutil.copyfile(bundle / name, folder / name)
    return [file.name for file in folder.iterdir()]


def model_config(
    name: str, manifest: dict[str, Any], backend: str, artefact: Artefact
) -> dict[str, Any]:
    """Make the model's configuration, as :func:`to_pbtxt` takes it."""
    batch = artefact.details.get("batch") or {"min": 1, "opt": 8, "max": MAX_BATCH}
    if batch["min"] > 1:
        raise InputError(
            f"{artefact.path} takes at least {batch['min']} images at once, Triton sends single "
            "ones: export with `batch=1:OPT:MAX`"
        )
    inputs, outputs = manifest["model"]["inputs"], manifest["model"]["outputs"]
    warm_up = {value["name"]: _warm_up(value, manifest) for value in inputs}
    sizes = sorted({1, batch["max"]})
    files = [name for name, labels in label_files(manifest).items() if labels]
    names = [{"label_filename": name} for name in files]
    config: dict[str, Any] = {
        "name": name,
        **{key: value for key, value in BACKENDS[backend].items() if key != "file"},
        "max_batch_size": batch["max"],
        "input": [_tensor(value) for value in inputs],
        "output": [
            {**_tensor(value), **(label_file or {})}
            for value, label_file in itertools.zip_longest(outputs, names)
        ],
    }
    if batch["max"] > 1:
        preferred = sorted({batch["opt"], batch["max"]} - {1})
        config["dynamic_batching"] = {
            "preferred_batch_size": preferred,
            "max_queue_delay_microseconds": QUEUE_DELAY,
        }
    if backend == "tensorrt":
        config["instance_group"] = [{"kind": Token("KIND_GPU"), "count": 1}]
    config["model_warmup"] = [
        {
            "name": f"batch {size}",
            "batch_size": size,
            "inputs": [{"key": key, "value": value} for key, value in warm_up.items()],
        }
        for size in sizes
    ]
    preprocessing = json.dumps(manifest["preprocessing"], ensure_ascii=False)
    config["parameters"] = [{"key": "preprocessing", "value": {"string_value": preprocessing}}]
    if backend == "python":  # "true" runs native code of a bundle from elsewhere
        config["parameters"].append({"key": "trust", "value": {"string_value": "false"}})
    return config


class Token(str):
    """A name of Triton's schema, written without quotes."""


def to_pbtxt(message: dict[str, Any], indent: str = "") -> str:
    """Write a message in protocol buffers' text format.

    Args:
        message: fields by name; dictionaries are messages, lists of them repeated ones.
        indent: at the start of every line.
    """
    lines = []
    for key, value in message.items():
        if isinstance(value, list) and not any(isinstance(item, dict) for item in value):
            lines.append(f"{indent}{key}: [{', '.join(map(_scalar, value))}]\n")
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                lines.append(f"{indent}{key} {{\n{to_pbtxt(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, Token):
        return value
    # JSON's escapes are the text format's; characters beyond ASCII stay as they are.
    return json.dumps(value, ensure_ascii=False)


def _choose(bundle: Path, manifest: dict[str, Any], backend: str | None) -> tuple[str, Artefact]:
    if backend not in (None, *BACKENDS):
        raise InputError(f"backend is {backend!r}; expected onnxruntime, tensorrt or python")
    artefacts = [Artefact.from_dict(row) for row in manifest["artefacts"]]
    if backend in (None, "tensorrt"):
        for artefact in artefacts:
            asked = backend == "tensorrt" and artefact.runnable
            if artefact.kind == "tensorrt" and (asked or artefact.status == VERIFIED):
                return "tensorrt", artefact
    if backend == "tensorrt":
        raise InputError(f"{bundle} holds no TensorRT engine: export with `trt=True`")
    return backend or "onnxruntime", next(a for a in artefacts if a.path == MODEL)


def _tensor(value: dict[str, Any]) -> dict[str, Any]:
    """Describe a tensor without its batch dimension; sizes that are not fixed are -1."""
    dims = [size if isinstance(size, int) else -1 for size in value["shape"][1:]]
    return {"name": value["name"], "data_type": Token(TYPES[value["dtype"]]), "dims": dims}


def _warm_up(value: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    tensor = _tensor(value)
    if -1 in tensor["dims"]:  # images of any size
        _, height, width = GraphInput.from_dict(manifest["preprocessing"]).preprocess.input_size
        tensor["dims"] = [height, width, 3]
    kind = "zero_data" if value["dtype"] == "uint8" else "random_data"
    return {"data_type": tensor["data_type"], "dims": tensor["dims"], kind: True}
