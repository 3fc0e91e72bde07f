"""ONNX: a folded model to a file of ordinary operators with a dynamic batch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastadapt.errors import InputError

from ..features import OUTPUT as FEATURES
from ..features import WithFeatures
from ..graph_input import BATCH, NAME, Deployed, GraphInput, insert_resize
from ..settings import OPSET
from .opsets import Operator, older_runtimes
from .tracing import plain_attention, quiet

# Protocol buffers end at 2 GiB; larger models have their weights in a file of their own.
ONE_FILE_LIMIT = 2_000_000_000


def export_onnx(
    folded: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, ...],
    other_inputs: dict[str, tuple[int, ...]] | None = None,
    graph_input: GraphInput | None = None,
    features: bool = False,
    outputs: Sequence[str] = (),
    labels: list[str] | tuple[str, ...] = (),
    metadata: dict[str, Any] | None = None,
    opset: int = OPSET,
) -> dict[str, Any]:
    """Write ``path`` (and ``path`` + ``.data`` if the weights need more than 2 GB).

    The first input is ``images``, as ``graph_input`` says, and ``other_inputs`` follow it; the
    output is ``logits`` [batch, classes], or ``features`` if the model has no head. The batch is
    dynamic.

    Args:
        folded: what :func:`fastadapt.fold` returned, or any module of ordinary operators that
            maps images to one tensor [B, ...], both fp32. It is put into evaluation mode.
        path: of the file.
        input_size: [C, H, W] or [C, D, H, W].
        other_inputs: what the model takes after the images, in this order: names and shapes of
            float32 tensors, without the batch dimension.
        graph_input: the part of the preprocessing that is in the graph. ``None``: nothing;
            ``images`` are then what the model takes, fp32 [batch, C, H, W] (volumes:
            [batch, C, D, H, W]).
        features: write a second output, ``features`` [batch, dim], those before the head; the
            module has timm's ``forward_features`` and ``forward_head``.
        outputs: names of the outputs of a module that gives a tuple of them.
        labels: class names, for the file's metadata.
        metadata: further metadata; values that are no strings are written as JSON.
        opset: of the graph; bf16 convolutions need 22.

    Returns:
        The manifest's description of the file: opset, the runtimes that take it, inputs, outputs.

    Raises:
        InputError: the model cannot be exported, with the exporter's reason; the graph has
            operators that other runtimes do not know; the batch became fixed.
    """
    import onnx

    path = Path(path)
    others = other_inputs or {}
    # With a batch of 1 the exporter would take it for a constant.
    example = [torch.rand(2, *size) for size in (input_size, *others.values())]
    if graph_input is not None and graph_input.dtype == "uint8":
        example[0] = (255 * example[0]).byte().movedim(1, -1)
    model = Deployed(WithFeatures(folded) if features else folded, graph_input, len(input_size))
    device = next(folded.parameters(), example[0]).device
    batch = {0: torch.export.Dim(BATCH)}
    classes = bool(getattr(folded, "num_classes", len(labels)))
    one = ["logits" if classes else FEATURES, *([FEATURES] if features else [])]
    with quiet("onnxscript", "onnx_ir"), plain_attention(model), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                model,
                tuple(x.to(device) for x in example),
                dynamo=True,
                opset_version=opset,
                input_names=[NAME, *others],
                output_names=list(outputs) or one,
                dynamic_shapes=(batch, (batch,) * len(others)) if others else (batch,),
                verbose=False,
            )
        except Exception as error:
            raise InputError(
                f"{type(folded).__name__} cannot be exported to ONNX: {_reason(error)} "
                "(FASTADAPT_DEBUG=1 shows the exporter's report)"
            ) from error

    if graph_input is not None and graph_input.resize:
        insert_resize(program.model.graph, graph_input.preprocess)
    _check_graph(program.model)
    strip(program.model)
    # The exporter writes its newest, which ONNX Runtime before 1.18 refuses whatever the opset.
    opsets = [onnx.helper.make_opsetid("", opset)]
    program.model.ir_version = onnx.helper.find_min_ir_version_for(opsets)
    program.model.metadata_props.update(_strings({"labels": list(labels), **(metadata or {})}))
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    write_model(program.model, path, external_data=size > ONE_FILE_LIMIT)
    graph = program.model.graph
    operators = [Operator(node.op_type, _attributes(node)) for node in _nodes(program.model)]
    return {
        "opset": opset,
        "taken_by": older_runtimes(opset, operators),
        "inputs": [_describe(value) for value in graph.inputs],
        "outputs": [_describe(value) for value in graph.outputs],
    }


def write_model(model: Any, path: Path, external_data: bool) -> None:
    """Save and check a graph's files under a temporary name, then rename them.

    Args:
        model: an ``onnx_ir.Model``.
        path: of the file.
        external_data: write the weights into ``path`` + ``.data``.
    """
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        file = Path(temporary) / path.name  # the graph refers to its data by name
        torch.onnx.ONNXProgram(model, None).save(str(file), external_data=external_data)
        onnx.checker.check_model(str(file), full_check=True)
        for part in sorted(Path(temporary).iterdir(), reverse=True):  # the data before the graph
            part.replace(path.parent / part.name)


def _check_graph(model: Any) -> None:
    foreign = {f"{node.domain}::{node.op_type}" for node in _nodes(model) if node.domain}
    foreign |= {"::".join(map(str, key[:2])) for key in model.functions}
    if foreign:
        raise InputError(
            f"the graph holds operators outside ONNX's own, {sorted(foreign)[0]} for one: other "
            "runtimes do not know them. Fold the model first (fa.fold)."
        )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None or isinstance(value.shape[0], int):
            raise InputError(
                f"the batch of {value.name} became fixed, {value.shape}: the model uses the batch "
                "size as a number somewhere (x.shape[0] in a condition or a list)"
            )


def strip(model: Any) -> None:
    """Remove the exporter's traces: source lines with paths of the machine that exported."""
    for node in _nodes(model):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None


def _nodes(model: Any) -> Iterator[Any]:
    from onnx_ir.traversal import RecursiveGraphIterator

    return iter(RecursiveGraphIterator(model.graph))


def _attributes(node: Any) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _describe(value: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size.value or "?") for size in value.shape]
    return {"name": value.name, "dtype": str(value.dtype.numpy()), "shape": shape}


class Interface(NamedTuple):
    """What a user sees of a graph: names of inputs and outputs, and the metadata."""

    inputs: list[str]
    outputs: list[str]
    metadata: dict[str, str]


def read_interface(path: str | Path) -> Interface:
    """Read the names and the metadata of an ONNX file."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return Interface(
        [value.name for value in model.graph.input],
        [value.name for value in model.graph.output],
        {entry.key: entry.value for entry in model.metadata_props},
    )


def _strings(metadata: dict[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in metadata.items()
    }


def _reason(error: BaseException) -> str:
    """Return the first line of the error that caused all others."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
