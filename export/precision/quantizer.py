"""ONNX Runtime's static quantiser, as INT8 and the engines' graphs call it."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastadapt.errors import InputError, first_line

from ..settings import Calibration
from .entropy import AbsoluteHistogram

# Operators between convolutions are quantised with them: otherwise the activations would go to
# fp32 and back at every one.
OPERATORS = ("Conv", "MatMul", "Add", "Clip", "Relu", "MaxPool", "Pad")


@dataclass(frozen=True)
class Quantization:
    """What is quantised, and how.

    Attributes:
        activations, weights: names of ONNX Runtime's ``QuantType``.
        calibration: how the range of an activation is found: ``"max"``, its least and largest
            value; ``"entropy"``, without what :mod:`.entropy` clips; ``"distribution"``, of the
            mean and spread of its values, for FP8.
        operators: kinds of nodes.
        per_channel: a scale for each output channel of weights.
        options: ``extra_options`` of ONNX Runtime's quantiser.
    """

    activations: str
    weights: str
    calibration: Calibration | Literal["distribution"] = "max"
    operators: tuple[str, ...] = OPERATORS
    per_channel: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def quantize_static(
    fp32: str | Path, path: str | Path, images: Iterable[np.ndarray], wanted: Quantization
) -> None:
    """Write the Q/DQ graph of an fp32 ONNX file; what few numbers decide stays in fp32.

    Args:
        fp32: the file, whose only input is images.
        path: of the result.
        images: batches that give the ranges of the activations, as the file takes them. They are
            read one by one, and of each only ranges and histograms are kept.
        wanted: what is quantised.

    Raises:
        InputError: the quantiser fails, with its reason.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization import quant_utils

    path = Path(path)
    try:
        with (
            tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary,
            contextlib.redirect_stdout(io.StringIO()),  # where it prints about its histograms
            _silent_root_logger(),
        ):
            prepared, result = Path(temporary) / "prepared.onnx", Path(temporary) / path.name
            quantization.quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
            activations = quantization.QuantType[wanted.activations]
            weights = quantization.QuantType[wanted.weights]
            model = quant_utils.load_model_with_shape_infer(prepared)
            # Since 1.23 the quantiser itself no longer raises the opset where FP8 needs it.
            if update := getattr(quant_utils, "update_opset_version", None):
                model = update(model, weights, activations)
                onnx.save(model, prepared)
            quantizer = quantization.QDQQuantizer(
                model,
                wanted.per_channel,
                False,  # all 8 bits
                weights,
                activations,
                _activation_ranges(prepared, images, wanted),
                [],
                delicate_nodes(prepared),
                list(wanted.operators),
                wanted.options,
            )
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(str(result))
            result.replace(path)
    except OSError:
        raise
    except Exception as error:
        given, reason = Path(fp32).name, first_line(error)
        raise InputError(f"ONNX Runtime cannot quantise {given}: {reason}") from error


def _activation_ranges(path: Path, images: Iterable[np.ndarray], wanted: Quantization) -> Any:
    """Run batches through a graph and return the ranges of its activations."""
    from onnxruntime import quantization
    from onnxruntime.quantization import calibrate

    class Once(quantization.CalibrationDataReader):
        """One batch: what is read at once, is kept until all of it is counted."""

        def __init__(self, batch: np.ndarray):
            self.batch: np.ndarray | None = batch

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch, self.batch = self.batch, None
            return None if batch is None else {name: batch}

    class Histograms(calibrate.CalibrationDataCollector):
        """Those of :mod:`.entropy`, by tensor, in the place of ONNX Runtime's own."""

        def __init__(self) -> None:
            self.found: dict[str, AbsoluteHistogram] = {}

        def collect(self, name_to_arr: dict[str, list[np.ndarray]]) -> None:
            for tensor, arrays in name_to_arr.items():
                histogram = self.found.setdefault(tensor, AbsoluteHistogram())
                for values in arrays:
                    histogram.add(values)

        def compute_collection_result(self) -> dict[str, calibrate.TensorData]:
            found = {}
            for tensor, histogram in self.found.items():
                low, high = (np.array(end, np.float32) for end in histogram.range)
                found[tensor] = calibrate.TensorData(lowest=low, highest=high)
            return found

    methods = quantization.CalibrationMethod
    method = {"max": methods.MinMax, "entropy": methods.Entropy}.get(
        wanted.calibration, methods.Distribution
    )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        calibrator = quantization.create_calibrator(
            path,
            list(wanted.operators),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=method,
        )
        if wanted.calibration == "entropy":
            calibrator.collector = Histograms()
        name = calibrator.infer_session.get_inputs()[0].name
        for batch in images:
            calibrator.collect_data(Once(batch))
        return calibrator.compute_data()


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

    They are products of two activations or of pooled features (the head), and sums of tokens: the
    residual connections of transformers.
    """
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.value_info, *graph.input)}
    weights = {tensor.name for tensor in graph.initializer}

    def stays(node: onnx.NodeProto) -> bool:
        given = [name for name in node.input if name not in weights]
        if node.op_type == "MatMul":
            return len(given) > 1 or ranks.get(given[0], 0) < 3
        if node.op_type == "Add":
            return ranks.get(given[0], 0) < 4
        return node.op_type == "Gemm"

    return [node.name for node in graph.node if stays(node)]
