"""Explicit Q/DQ graphs for TensorRT, in INT8 and FP8.

TensorRT builds strongly typed networks: where the graph quantises, the engine does, and nowhere
else. ONNX Runtime's quantiser writes QuantizeLinear and DequantizeLinear around convolutions and
products of tokens with weights, symmetric as TensorRT demands, with biases left in fp32:

- INT8: a scale for each output channel of weights, one for each activation, of the largest values.
  (ONNX Runtime's entropy calibration makes histograms of as many bins as INT8 has steps, so that it
  gives the same scales.)
- FP8 (e4m3): a scale for each tensor, from the spread of its values; products of matrices alone.

What few numbers decide (cluster attention's mixture, the head, products of two activations, sums of
tokens) stays in fp32, as in :mod:`fastadapt.export.precision.int8`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastadapt.errors import InputError
from fastadapt.files import atomic_path

from .quantizer import OPERATORS, delicate_nodes, quantize_static


def write_qdq(
    onnx_file: str | Path,
    path: str | Path,
    images: Iterable[np.ndarray],
    precision: Literal["int8", "fp8"],
) -> None:
    """Write the Q/DQ graph of an fp32 ONNX file.

    Args:
        onnx_file: the fp32 file, whose only input is images.
        path: of the result.
        images: batches that give the ranges of the activations, as the file takes them.
        precision: of what is quantised.

    Raises:
        InputError: the quantiser fails, with its reason; nothing in the graph can be quantised.
    """
    import onnx
    from onnxruntime import quantization

    methods = quantization.CalibrationMethod
    if precision == "int8":
        dtype, operators, method = quantization.QuantType.QInt8, list(OPERATORS), methods.MinMax
    else:  # whose quantiser calibrates by distribution alone
        dtype, operators = quantization.QuantType.QFLOAT8E4M3FN, ["MatMul"]
        method = methods.Distribution
    graph = onnx.load(onnx_file, load_external_data=False).graph
    excluded = delicate_nodes(Path(onnx_file))
    if not any(n.op_type in operators and n.name not in excluded for n in graph.node):
        raise InputError(f"{onnx_file} has nothing that {precision} could compute")
    quantize_static(
        onnx_file,
        path,
        images,
        op_types_to_quantize=operators,
        per_channel=precision == "int8",
        activation_type=dtype,
        weight_type=dtype,
        calibrate_method=method,
        extra_options={"ActivationSymmetric": True, "QuantizeBias": False},
    )
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
