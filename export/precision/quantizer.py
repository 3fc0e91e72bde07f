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
from .bias_correction import InputMeans, convolutions, correct_biases, output_shifts
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
    fp32: str | Path,
    path: str | Path,
    images: Iterable[np.ndarray],
    wanted: Quantization,
    keep: Iterable[str] = (),
) -> None:
    """Write the Q/DQ graph of an fp32 ONNX file; what few numbers decide stays in fp32.

    Args:
        fp32: the file, whose only input is images.
        path: of the result.
        images: batches that give the ranges of the activations, as the file takes them. They are
            read one by one, and of each only ranges and histograms are kept.
        wanted: what is quantised.
        keep: layers that stay in fp32, by the names of :func:`graph_layers`.

    Raises:
        InputError: the quantiser fails, with its reason.
    """
    calibrate(fp32, images, wanted).write(path, keep)


@dataclass(frozen=True)
class Calibrated:
    """An fp32 graph and what calibration found; it is quantised as often as needed.

    Attributes:
        name: of the fp32 file.
        model: the graph, prepared for quantisation.
        ranges: of its activations.
        shifts: of the convolutions' outputs: :mod:`.bias_correction`; none where weights do not
            have a scale for each output channel.
        delicate: nodes that stay in fp32 in any case.
        wanted: what is quantised.
    """

    name: str
    model: Any
    ranges: Any
    shifts: dict[str, np.ndarray]
    delicate: list[str]
    wanted: Quantization

    def write(self, path: str | Path, keep: Iterable[str] = ()) -> None:
        """Write the Q/DQ graph.

        Args:
            path: of the result.
            keep: layers that stay in fp32, by the names of :func:`graph_layers`.

        Raises:
            InputError: the quantiser fails, with its reason.
        """
        import onnx
        from onnxruntime import quantization

        path = Path(path)
        layers = graph_layers(self.model.graph)
        excluded = {*self.delicate, *(node for name in keep for node in layers[name])}
        wanted, model = self.wanted, onnx.ModelProto()
        model.CopyFrom(self.model)
        fp32 = {name for node in model.graph.node if node.name in excluded for name in node.output}
        shifts = {name: shift for name, shift in self.shifts.items() if name not in fp32}
        correct_biases(model, shifts)
        with (
            _quantising(self.name),
            tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary,
        ):
            result = Path(temporary) / path.name
            quantizer = quantization.QDQQuantizer(
                model,
                wanted.per_channel,
                False,  # all 8 bits
                quantization.QuantType[wanted.weights],
                quantization.QuantType[wanted.activations],
                self.ranges,
                [],
                sorted(excluded),
                list(wanted.operators),
                wanted.options,
            )
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(str(result))
            result.replace(path)


def calibrate(fp32: str | Path, images: Iterable[np.ndarray], wanted: Quantization) -> Calibrated:
    """Find what the quantiser needs to know of a graph's activations; as for quantize_static."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization import quant_utils

    fp32 = Path(fp32)
    with (
        _quantising(fp32.name),
        tempfile.TemporaryDirectory(dir=fp32.parent, prefix=f".{fp32.name}.") as folder,
    ):
        prepared = Path(folder) / "prepared.onnx"
        quantization.quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
        model = quant_utils.load_model_with_shape_infer(prepared)
        # Since 1.23 the quantiser itself no longer raises the opset where FP8 needs it.
        if update := getattr(quant_utils, "update_opset_version", None):
            types = [quantization.QuantType[name] for name in (wanted.weights, wanted.activations)]
            model = update(model, *types)
            onnx.save(model, prepared)
        means = None
        if wanted.weights == "QInt8" and wanted.per_channel and convolutions(model):
            means = InputMeans(model, Path(folder))
        ranges = _activation_ranges(prepared, _observed(images, means), wanted)
        shifts = output_shifts(model, means.means) if means else {}
        return Calibrated(fp32.name, model, ranges, shifts, delicate_nodes(prepared), wanted)


def _observed(images: Iterable[np.ndarray], means: InputMeans | None) -> Iterator[np.ndarray]:
    for batch in images:
        if means is not None:
            means.add(batch)
        yield batch


@contextlib.contextmanager
def _quantising(name: str) -> Iterator[None]:
    """Silence ONNX Runtime's quantiser, and turn its exceptions into one."""
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),  # where it prints about its histograms
            _silent_root_logger(),
        ):
            yield
    except OSError:
        raise
    except Exception as error:
        raise InputError(f"ONNX Runtime cannot quantise {name}: {first_line(error)}") from error


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


def graph_layers(graph: Any) -> dict[str, list[str]]:
    """Return the layers of a graph whose precision can be chosen, in the order they run in.

    They are convolutions and products with weights, each with the activation that alone reads it.

    Args:
        graph: an ``onnx.GraphProto``.

    Returns:
        Names of nodes by that of the layer: its module's, where the weights have its name.
    """
    weights = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    layers = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "MatMul") or node.input[1] not in weights or not node.name:
            continue
        nodes = [node.name]
        after = readers.get(node.output[0], [])
        if len(after) == 1 and after[0].op_type in ("Clip", "Relu"):
            nodes.append(after[0].name)
        module = node.input[1].removeprefix("model.").removesuffix(".weight")
        layers[module if module != node.input[1] else node.name] = nodes
    return layers
