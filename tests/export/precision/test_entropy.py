"""Entropy calibration: its threshold alone, and in the graphs of ONNX Runtime and TensorRT."""

import numpy as np
import onnx
import pytest

from fastadapt.export import EngineOptions
from fastadapt.export.artefact import VERIFIED
from fastadapt.export.bundle import int8_files
from fastadapt.export.precision import int8
from fastadapt.export.precision.entropy import BINS, AbsoluteHistogram
from fastadapt.export.precision.fallback import Int8Layers
from fastadapt.export.precision.int8 import QuantizationImages, quantize_int8
from fastadapt.export.precision.qdq import write_qdq
from fastadapt.export.runtimes import load_runtime


def rounding(values, low, high):
    """The error of INT8 with a step of 1/127 of the range."""
    step = max(-low, high) / 127
    return np.sqrt(np.mean((values - np.clip(np.round(values / step), -127, 127) * step) ** 2))


def histogram(values, parts=7):
    found = AbsoluteHistogram()
    for part in np.array_split(values, parts):
        found.add(part)
    return found


def test_outliers_are_clipped_and_nothing_else():
    rng = np.random.default_rng(0)
    plain = rng.standard_normal(100_000).astype(np.float32)
    # Half of ReLU's values are zeros, which are exact at every threshold.
    for values in (plain, np.maximum(plain, 0), rng.random(100_000)):
        whole = rounding(values, values.min(), values.max())
        assert rounding(values, *histogram(values).range) < 1.05 * whole
    outlier = np.append(plain, np.float32(200))
    low, high = histogram(outlier).range
    assert low == pytest.approx(plain.min()) and high < 20
    assert rounding(plain, low, high) < 0.1 * rounding(plain, outlier.min(), outlier.max())


def test_memory_does_not_grow():
    """Bins are merged where values get larger, by however much; nothing is lost."""
    found = histogram(np.zeros(8, np.float32))
    assert found.range == (0, 0)
    for scale in (1e-6, 1, 1e-3, 1e6):
        found.add(np.linspace(-scale, scale, 1000))
    assert (found.counts.shape, found.counts.sum()) == ((BINS,), 4008)
    assert found.range[0] >= -1e6 and found.range[1] <= 1e6
    found.add(np.empty((0, 3)))
    with pytest.raises(ValueError, match="not finite"):
        found.add(np.array([1, np.inf]))


GRAPH = """<ir_version: 10, opset_import: ["": 20]>
model (float[batch, 3, 16, 16] images) => (float[batch, 16, 12, 12] maps) {
    first = Conv(images, w1)
    positive = Relu(first)
    maps = Conv(positive, w2)
}"""


@pytest.fixture(scope="module")
def outlier(tmp_path_factory):
    """An ONNX file, and calibration images of which one has a pixel far beyond all others."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(GRAPH)
    for name, shape in {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3)}.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    folder = tmp_path_factory.mktemp("outlier")
    onnx.save(model, folder / "model.onnx")
    images = rng.random((40, 3, 16, 16), dtype=np.float32)
    images[5, 1, 7, 7] = 40  # the first 16 calibrate
    return folder, QuantizationImages(range(16), range(16, 40), None, lambda n: images[list(n)])


@pytest.mark.parametrize("kind", ["cpu", "cuda", "tensorrt"])
def test_an_outlier_costs_less_than_with_the_largest_values(outlier, tmp_path, kind):
    """In ONNX Runtime's INT8 for CPUs and GPUs, and in the graphs of TensorRT's engines."""
    folder, images = outlier
    clean = images.read(images.validation)
    expected = load_runtime(folder / "model.onnx", device="cpu")(clean)
    errors = {}
    for calibration in ("max", "entropy"):
        path = tmp_path / f"{calibration}.onnx"
        if kind == "tensorrt":
            batches = images.batches(images.calibration)
            write_qdq(folder / "model.onnx", path, batches, "int8", calibration)
        else:
            quantize_int8(folder / "model.onnx", path, images, kind, calibration)
        found = load_runtime(path, device="cpu")(clean)
        errors[calibration] = np.sqrt(np.mean((found - expected) ** 2))
    assert errors["entropy"] < 0.5 * errors["max"], errors


def test_both_pass_the_gate(calibrated, monkeypatch):
    monkeypatch.setattr(int8, "speeds_in_turns", lambda runtimes, example: (10.0, 20.0))
    for calibration in ("max", "entropy"):
        options = EngineOptions(int8=True, calibration=calibration)
        layers = Int8Layers(calibrated.onnx, calibrated.images, calibration=calibration)
        found = int8_files.build_int8(options, calibrated, layers)
        assert (found.path, found.status) == ("model.int8.onnx", VERIFIED)
        assert found.details["calibration"] == calibration
        assert found.details["judgement"]["accuracy"] == 1.0
        assert found.parity[0].problems == ()
