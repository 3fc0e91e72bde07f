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

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastadapt.errors import InputError, first_line

from .int8 import OPERATORS, delicate_nodes


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
    from onnxruntime.quantization.shape_inference import quant_pre_process

    methods = quantization.CalibrationMethod
    if precision == "int8":
        dtype, operators = quantization.QuantType.QInt8, list(OPERATORS)
        method = methods.MinMax
    else:
        dtype, operators = quantization.QuantType.QFLOAT8E4M3FN, ["MatMul"]
        method = methods.Distribution  # the only one that it has for floating point

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, name: str, batches: Iterator[np.ndarray]):
            self.name, self.batches = name, batches
            self.shape: tuple[int, ...] = ()

        def get_next(self):
            batch = next(self.batches, None)
            if batch is None:
                return None
            # Histograms are of batches of one size: a smaller last one repeats its images.
            self.shape = self.shape or batch.shape
            return {self.name: np.resize(batch, self.shape)}

    path = Path(path)
    try:
        with (
            tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary,
            contextlib.redirect_stdout(io.StringIO()),  # where it prints about its histograms
            _silent_root_logger(),
        ):
            prepared, result = Path(temporary) / "prepared.onnx", Path(temporary) / path.name
            quant_pre_process(str(onnx_file), str(prepared), skip_symbolic_shape=True)
            graph = onnx.load(prepared, load_external_data=False).graph
            excluded = delicate_nodes(prepared)
            if not any(n.op_type in operators and n.name not in excluded for n in graph.node):
                raise InputError(f"{onnx_file} has nothing that {precision} could compute")
            quantization.quantize_static(
                str(prepared),
                str(result),
                Reader(graph.input[0].name, iter(images)),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=operators,
                nodes_to_exclude=excluded,
                per_channel=precision == "int8",
                activation_type=dtype,
                weight_type=dtype,
                calibrate_method=method,
                extra_options={"ActivationSymmetric": True, "QuantizeBias": False},
            )
            model = onnx.load(result)
            _keep_onnx_domain(model)
            onnx.save(model, result)
            result.replace(path)
    except (OSError, InputError):
        raise
    except Exception as error:
        given, reason = Path(onnx_file).name, first_line(error)
        raise InputError(
            f"ONNX Runtime cannot quantise {given} to {precision}: {reason}"
        ) from error


def _keep_onnx_domain(model: Any) -> None:
    """Drop the quantiser's declarations of domains that no node is of."""
    used = {node.domain for node in model.graph.node}
    kept = [opset for opset in model.opset_import if opset.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(kept)


@contextlib.contextmanager
def _silent_root_logger() -> Iterator[None]:
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # the quantiser warns on the root logger
    try:
        yield
    finally:
        logger.setLevel(level)
