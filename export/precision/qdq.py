"""Explicit Q/DQ graphs for TensorRT, in INT8 and FP8.

TensorRT builds strongly typed networks: where the graph quantises, the engine does, and nowhere
else. ONNX Runtime's quantiser writes QuantizeLinear and DequantizeLinear around convolutions and
products of tokens with weights, symmetric as TensorRT demands, with biases left in fp32:

- INT8: a scale for each output channel of weights, one for each activation, of the largest values
  or with entropy calibration (:mod:`fastadapt.export.precision.entropy`).
- FP8 (e4m3): a scale for each tensor, from the spread of its values; products of matrices alone.

What few numbers decide (cluster attention's mixture, the head, products of two activations, sums of
tokens) stays in fp32, as in :mod:`fastadapt.export.precision.int8`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastadapt.errors import InputError
from fastadapt.files import atomic_path

from ..settings import Calibration
from .quantizer import OPERATORS, Quantization, delicate_nodes, quantize_static


def check_fp8() -> None:
    """Raise InputError where ONNX Runtime's quantiser to FP8 does not work with the onnx here.

    Before 1.24 it calls functions that onnx dropped in 1.19 and 1.20.
    """
    import onnx
    import onnxruntime

    runtime, installed = onnxruntime.__version__, onnx.__version__
    if _release(runtime) < (1, 24) and _release(installed) >= (1, 19):
        raise InputError(
            f"`fp8` needs ONNX Runtime's quantiser, and that of {runtime} does not work with onnx "
            f"{installed}: install onnxruntime 1.24 or newer, or onnx older than 1.19"
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def write_qdq(
    onnx_file: str | Path,
    path: str | Path,
    images: Iterable[np.ndarray],
    precision: Literal["int8", "fp8"],
    calibration: Calibration = "max",
) -> None:
    """Write the Q/DQ graph of an fp32 ONNX file.

    Args:
        onnx_file: the fp32 file, whose only input is images.
        path: of the result.
        images: batches that give the ranges of the activations, as the file takes them.
        precision: of what is quantised.
        calibration: of INT8's activations.

    Raises:
        InputError: the quantiser fails, with its reason; nothing in the graph can be quantised.
    """
    import onnx

    if precision == "fp8":
        check_fp8()

    # ONNX Runtime's quantiser to FP8 knows calibration by distribution alone.
    wanted = Quantization(
        *(("QInt8",) * 2 if precision == "int8" else ("QFLOAT8E4M3FN",) * 2),
        calibration if precision == "int8" else "distribution",
        OPERATORS if precision == "int8" else ("MatMul",),
        per_channel=precision == "int8",
        options={"ActivationSymmetric": True, "QuantizeBias": False},
    )
    graph = onnx.load(onnx_file, load_external_data=False).graph
    excluded = delicate_nodes(Path(onnx_file))
    if not any(n.op_type in wanted.operators and n.name not in excluded for n in graph.node):
        raise InputError(f"{onnx_file} has nothing that {precision} could compute")
    quantize_static(onnx_file, path, images, wanted)
    with atomic_path(path) as temporary:
        model = onnx.load(path)
        _keep_onnx_domain(model)
        onnx.save(model, temporary)


def _keep_onnx_domain(model: Any) -> None:
    """Drop the quantiser's declarations of domains that no node is of."""
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(kept)
