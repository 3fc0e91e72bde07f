"""NVIDIA Triton Inference Server: a bundle as a model of a model repository.

The layout and ``config.pbtxt`` are documented in Triton's "Model Repository" and "Model
Configuration"; the schema is ``model_config.proto`` of triton-inference-server/common.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from fastadapt.errors import InputError
from fastadapt.files import write_text

from .artefact import VERIFIED, Artefact
from .bundle.consistency import check_consistency
from .bundle.manifest import LABELS, MODEL, check_accepted, check_files, read_manifest
from .bundle.staging import place, staging
from .graph_input import GraphInput

CONFIG = "config.pbtxt"
TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "float16": "TYPE_FP16"}
BACKENDS = {
    "onnxruntime": {"platform": "onnxruntime_onnx", "file": "model.onnx"},
    "tensorrt": {"platform": "tensorrt_plan", "file": "model.plan"},
}
MAX_BATCH = 32
# Time that a request waits for others to share its batch; less than a batch takes on most GPUs.
QUEUE_DELAY = 500  # microseconds


def check_repository(repository: str | Path, bundle: str | Path, overwrite: bool = False) -> Path:
    """Return the folder that a bundle's model will have in a repository.

    Raises:
        InputError: the repository is a file, or holds a model of that name.
    """
    repository = Path(repository)
    if repository.exists() and not repository.is_dir():
        raise InputError(f"{repository} is a file; expected a folder of models")
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(bundle).absolute().name)
    target = repository / name
    if target.exists() and not (target / CONFIG).is_file():
        raise InputError(f"{target} exists and is no Triton model: choose another `repository`")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists: replace it with `overwrite=True`")
    return target


def write_repository(
    bundle: str | Path,
    repository: str | Path,
    *,
    backend: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Add a bundle's model to a model repository: ``NAME/config.pbtxt``, ``NAME/1/model.*``.

    Requests are batched dynamically, the warm-up runs the smallest and the largest batch, and
    class names come with Triton's classification extension.

    Args:
        bundle: a folder, whose name becomes the model's.
        repository: a folder, made if need be.
        backend: ``"onnxruntime"`` or ``"tensorrt"``; if ``None``, TensorRT where the bundle holds
            an engine that was verified. (TensorRT-RTX is no back end of Triton's.)
        overwrite: replace a model of that name.

    Returns:
        The model's folder.

    Raises:
        InputError: the bundle is damaged or rejected, holds nothing for that back end, or the
            model exists.
    """
    bundle = Path(bundle)
    target = check_repository(repository, bundle, overwrite)
    manifest = read_manifest(bundle)
    check_accepted(bundle, manifest)
    check_files(bundle, manifest)
    check_consistency(bundle, manifest)
    backend, artefact = _choose(bundle, manifest, backend)
    config = model_config(target.name, manifest, backend, artefact)
    with staging(target) as folder:
        version = folder / "1"
        version.mkdir()
        for name in artefact.files or (MODEL,):
            if name == artefact.path:
                shutil.copyfile(bundle / name, version / BACKENDS[backend]["file"])
            elif name.endswith(".data"):  # the graph refers to its weights by their name
                shutil.copyfile(bundle / name, version / name)
        if manifest["labels"]:
            shutil.copyfile(bundle / LABELS, folder / LABELS)
        write_text(folder / CONFIG, to_pbtxt(config))
        place(folder, target)
    return target


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
    label_file = {"label_filename": LABELS} if manifest["labels"] else {}
    config: dict[str, Any] = {
        "name": name,
        "platform": BACKENDS[backend]["platform"],
        "max_batch_size": batch["max"],
        "input": [_tensor(value) for value in inputs],
        "output": [{**_tensor(value), **label_file} for value in outputs],
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
        raise InputError(f"backend is {backend!r}; expected {' or '.join(BACKENDS)}")
    artefacts = [Artefact.from_dict(row) for row in manifest["artefacts"]]
    if backend != "onnxruntime":
        for artefact in artefacts:
            asked = backend == "tensorrt" and artefact.runnable
            if artefact.kind == "tensorrt" and (asked or artefact.status == VERIFIED):
                return "tensorrt", artefact
    if backend == "tensorrt":
        raise InputError(f"{bundle} holds no TensorRT engine: export with `trt=True`")
    return "onnxruntime", next(artefact for artefact in artefacts if artefact.path == MODEL)


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
