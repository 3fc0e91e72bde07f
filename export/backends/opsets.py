"""Which older runtimes take an ONNX graph, by its opset and operators.

ONNX Runtime's releases are those of its own table of versions. TensorRT's operators are those that
its ONNX parser lists for 10.1, the last list published before 10.3 (Jetson's), which takes the same
opsets, 9 to 20. The lists are compared with the graph; neither runtime is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

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


class Operator(NamedTuple):
    """A node, as far as runtimes limit it."""

    name: str
    attributes: dict[str, Any]


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
        if operator.name not in TENSORRT_OPERATORS:
            unknown.add(operator.name)
        if operator.name == "Resize" and operator.attributes.get("antialias"):
            unknown.add("Resize with antialiasing")
    if unknown:
        problems.append(f"{', '.join(sorted(unknown))}: not in TensorRT {TENSORRT}")
    return problems
