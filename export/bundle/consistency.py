"""Whether a bundle's parts say the same: class names, sizes and preprocessing stand in several.

Class names stand in the manifest, in ``labels.txt`` and in the ONNX files' metadata, and their
number is the width of the output; the preprocessing stands in the manifest and in the metadata.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastadapt.errors import InputError, counted

from ..tasks import named_tasks
from .manifest import LABELS, MANIFEST, MODEL, label_files


def check_consistency(bundle: str | Path, manifest: dict[str, Any]) -> None:
    """Raise InputError naming the first two parts of a bundle that contradict each other."""
    bundle = Path(bundle)
    for name, labels in label_files(manifest).items():
        if name in manifest["files"] and read_labels(bundle / name) != labels:
            raise InputError(_contradiction(bundle, "class names", name))
    if not named_tasks(manifest):
        for task in manifest.get("tasks", ())[:1]:
            if task["labels"] != manifest["labels"]:
                raise InputError(
                    f"{bundle / MANIFEST}: the first task has other labels than 'labels'"
                )
    outputs = manifest["model"].get("outputs", ())
    for output, labels in zip(outputs, _labels_of_outputs(manifest), strict=False):
        shape = output.get("shape")
        width = shape[-1] if shape else None
        if labels and width not in (None, len(labels)):
            raise InputError(
                f"{bundle / MANIFEST} names {counted(len(labels), 'class', 'classes')}; the model "
                f"has {counted(width, 'output')}"
            )
    for artefact in manifest["artefacts"]:
        if artefact["kind"] == "onnx" and artefact["path"] is not None:
            _check_onnx(bundle, manifest, artefact)


def _labels_of_outputs(manifest: dict[str, Any]) -> list[list[str]]:
    """Return the class names of each output: of the first, or of one for each task."""
    return [task["labels"] for task in named_tasks(manifest)] or [manifest["labels"]]


def read_labels(path: Path) -> list[str]:
    """Read class names, one a line, as they were written."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8: copy the bundle again") from None
    return lines[:-1] if lines[-1] == "" else lines


def check_labels(labels: list[str]) -> None:
    """Raise InputError for a class name that files of one name a line cannot hold."""
    for label in labels:
        if not label.strip() or len(label.splitlines()) != 1 or label.splitlines()[0] != label:
            raise InputError(
                f"the class name {label!r} is empty or holds a line break, which {LABELS} cannot "
                "hold: rename the class"
            )


def _check_onnx(bundle: Path, manifest: dict[str, Any], artefact: dict[str, Any]) -> None:
    import onnx

    file = bundle / artefact["path"]
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception:  # protocol buffers' errors have no common base
        return  # the runtime says why it cannot load the file
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in artefact.get("files", ()):
                raise InputError(
                    f"{file} reads {entry.value!r}, which the manifest does not list for it"
                )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    labels = _parsed(metadata.get("labels"))
    stated = labels if manifest["schema"] >= 3 else labels or None  # once left empty
    if stated is not None and stated != manifest["labels"]:
        raise InputError(_contradiction(bundle, "class names", f"{file.name}'s metadata"))
    tasks, stated = named_tasks(manifest), _parsed(metadata.get("tasks"))
    if stated is not None and stated != {task["name"]: task["labels"] for task in tasks}:
        raise InputError(_contradiction(bundle, "tasks", f"{file.name}'s metadata"))
    preprocessing = _parsed(metadata.get("preprocessing"))
    if preprocessing is not None and preprocessing != manifest["preprocessing"]:
        raise InputError(_contradiction(bundle, "preprocessing", f"{file.name}'s metadata"))
    for output, named in zip(model.graph.output, _labels_of_outputs(manifest), strict=False):
        sizes = output.type.tensor_type.shape.dim
        width = sizes[-1].dim_value if len(sizes) > 1 else 0
        if named and width and width != len(named):
            raise InputError(
                f"{bundle / MANIFEST} names {counted(len(named), 'class', 'classes')}; "
                f"{file.name} has {counted(width, 'output')}"
            )
    if tasks and [value.name for value in model.graph.output] != [t["name"] for t in tasks]:
        raise InputError(_contradiction(bundle, "tasks", f"{file.name}'s outputs"))
    if artefact["path"] == MODEL:
        _check_graph(bundle, manifest["model"], model)


def _check_graph(bundle: Path, stated: dict[str, Any], model: Any) -> None:
    """Compare opset, inputs and outputs, as far as the manifest states them, with the graph's."""
    opset = next((entry.version for entry in model.opset_import if not entry.domain), None)
    differs = [] if stated.get("opset", opset) == opset else ["opset"]
    graph = {"inputs": model.graph.input, "outputs": model.graph.output}
    for key, values in graph.items():
        entries = stated.get(key)
        described = [_described(value) for value in values]
        if (entries and len(entries) != len(described)) or (
            entries
            and any(
                entry.get(name, value[name]) != value[name]
                for entry, value in zip(entries, described, strict=True)
                for name in value
            )
        ):
            differs.append(key)
    if differs:
        raise InputError(_contradiction(bundle, differs[0], MODEL))


def _described(value: Any) -> dict[str, Any]:
    """Describe an input or output of a graph as manifests do."""
    import onnx

    tensor = value.type.tensor_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:  # a damaged graph, which no runtime loads
        dtype = "unknown"
    shape = [size.dim_value or size.dim_param for size in tensor.shape.dim]
    return {"name": value.name, "dtype": dtype, "shape": shape}


def _parsed(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _contradiction(bundle: Path, what: str, where: str) -> str:
    return (
        f"{bundle}: the {what} of {MANIFEST} and of {where} differ: export again, or take the "
        "bundle from where it was made"
    )
