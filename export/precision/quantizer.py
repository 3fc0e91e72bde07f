"""ONNX Runtime's static quantiser, as INT8 and the engines' graphs call it."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastadapt.errors import InputError, first_line

# Operators between convolutions are quantised with them: otherwise the activations would go to
# fp32 and back at every one.
OPERATORS = ("Conv", "MatMul", "Add", "Clip", "Relu", "MaxPool", "Pad")


def quantize_static(
    fp32: str | Path, path: str | Path, images: Iterable[np.ndarray], **settings: Any
) -> None:
    """Write the Q/DQ graph of an fp32 ONNX file; what few numbers decide stays in fp32.

    Args:
        fp32: the file, whose only input is images.
        path: of the result.
        images: batches that give the ranges of the activations, as the file takes them. Histograms
            are of batches of one size: a smaller last batch repeats its images.
        **settings: of ONNX Runtime's function of this name.

    Raises:
        InputError: the quantiser fails, with its reason.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, name: str):
            self.name, self.batches = name, iter(images)
            self.shape: tuple[int, ...] = ()

        def get_next(self):
            batch = next(self.batches, None)
            if batch is None:
                return None
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
            quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
            name = onnx.load(prepared, load_external_data=False).graph.input[0].name
            quantization.quantize_static(
                str(prepared),
                str(result),
                Reader(name),
                quant_format=quantization.QuantFormat.QDQ,
                nodes_to_exclude=delicate_nodes(prepared),
                **settings,
            )
            result.replace(path)
    except OSError:
        raise
    except Exception as error:
        given, reason = Path(fp32).name, first_line(error)
        raise InputError(f"ONNX Runtime cannot quantise {given}: {reason}") from error


@contextlib.contextmanager
def _silent_root_logger() -> Iterator[None]:
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # the quantiser warns on the root logger
    try:
        yield
    finally:
        logger.setLevel(level)


def delicate_nodes(path: Path) -> list[str]:
    """Return the nodes that stay in fp32.

    They are products of two activations or of pooled features, and sums of tokens: the residual
    connections of transformers.
    """
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.value_info, *graph.input)}
    weights = {tensor.name for tensor in graph.initializer}

    def stays(node: onnx.NodeProto) -> bool:
        given = [name for name in node.input if name not in weights]
        if node.op_type == "MatMul":
            return len(given) > 1 or ranks.get(given[0], 0) < 3
        return node.op_type == "Add" and ranks.get(given[0], 0) < 4

    return [node.name for node in graph.node if stays(node)]
