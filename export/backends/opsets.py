"""Which older runtimes take an ONNX graph, by its opset and operators.

ONNX Runtime's releases are those of its own table of versions. TensorRT's operators are those that
its ONNX parser lists for 10.1, the last list published before 10.3 (Jetson's), which takes the same
opsets, 9 to 20. The lists are compared with the graph; neither runtime is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# The first release of ONNX Runtime that takes an opset; older ones refuse the file.
ONNXRUNTIME = {18: "1.14", 19: "1.15", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 24: "1.24"}
TENSORRT, TENSORRT_OPSET = "10.3", 20
# https://github.com/onnx/onnx-tensorrt/blob/96e7811/docs/operators.md
_LISTED = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast
    Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv
    DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten
    Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish
    Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu
    Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu
    Pad Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
    Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round Scan
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus
    Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose
    Trilu Unsqueeze Where Xor
"""
TENSORRT_OPERATORS = frozenset(_LISTED.split())
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


class Operator(NamedTuple):
    """A node, as far as runtimes limit it.

    Attributes:
        name: of the operator.
        attributes: by name.
        domain: whose operator it is; empty for ONNX's own.
        shifted: it quantises with a zero point that is not 0, or to unsigned numbers.
    """

    name: str
    attributes: dict[str, Any]
    domain: str = ""
    shifted: bool = False


def older_runtimes_of(path: str | Path) -> dict[str, str]:
    """Say from which release on runtimes take an ONNX file, as :func:`older_runtimes` does."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    found = older_runtimes(opset, _operators(model.graph))
    if any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer):
        found["onnxruntime"] += ", on devices that it has operators in bf16 for"
    return found


def _operators(graph: Any) -> Iterator[Operator]:
    """Yield the nodes of a graph, with whole numbers as attributes, and those of subgraphs."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        zero = tensors.get(node.input[2]) if node.op_type in QUANTIZERS and node.input[2:] else None
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        yield Operator(node.op_type, attributes, node.domain, _is_shifted(zero))
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _operators(inner)


def _is_shifted(zero: Any) -> bool:
    from onnx import TensorProto, numpy_helper

    if zero is None or zero.data_location == TensorProto.EXTERNAL:  # of many channels, all 0
        return False
    values = numpy_helper.to_array(zero)
    return values.dtype.kind == "u" or bool(np.any(values.astype(np.float32)))


def older_runtimes(opset: int, operators: Iterable[Operator]) -> dict[str, str]:
    """Say from which release on runtimes take a graph, or why not.

    Args:
        opset: of the graph.
        operators: its nodes, those of subgraphs among them.

    Returns:
        By runtime: ``"1.17 or newer"``, ``"10.3 or newer"``, or what is in the way.
    """
    least = ONNXRUNTIME.get(opset)
    problems = tensorrt_problems(opset, operators)
    return {
        "onnxruntime": f"{least} or newer" if least else "the newest",
        "tensorrt": "; ".join(problems) if problems else f"{TENSORRT} or newer",
    }


def tensorrt_problems(opset: int, operators: Iterable[Operator]) -> list[str]:
    """List what TensorRT 10.3 does not document; nothing if it takes the graph."""
    problems = []
    if opset > TENSORRT_OPSET:
        problems.append(f"opset {opset}; TensorRT {TENSORRT} takes up to {TENSORRT_OPSET}")
    unknown: set[str] = set()
    for operator in operators:
        if operator.domain not in ("", "ai.onnx"):
            unknown.add(f"{operator.name} of {operator.domain}")
        elif operator.name not in TENSORRT_OPERATORS:
            unknown.add(operator.name)
        if operator.shifted:
            unknown.add(f"{operator.name} of unsigned numbers or with a zero point")
        if operator.name == "Resize" and operator.attributes.get("antialias"):
            unknown.add("Resize with antialiasing")
    if unknown:
        problems.append(f"{', '.join(sorted(unknown))}: not in TensorRT {TENSORRT}")
    return problems
