"""ONNX Runtime's operators for a GPU: which there are, what they compute, and what stays."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from fastadapt.export.backends.fused_attention import fuse_attention
from fastadapt.export.backends.fused_transformer import fuse_for_gpu
from fastadapt.export.precision import half
from fastadapt.export.runtimes import load_runtime

OTHERS = """<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
model (float16[batch, 5, 4] x, float16[4, 4] w, float16[4] b) => (float16[batch, 5, 4] y) {
  given = MatMul(x, w)
  biased = Add(given, b)
  curved = Gelu <approximate = "tanh"> (biased)
  total = Add(x, curved)
  normal = LayerNormalization <axis = -1> (total, b, b)
  y = Transpose <perm = [0, 2, 1]> (normal)
}"""


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture
def in_half(calibrated):
    units = half.precision_units(calibrated.module, calibrated.example[0])
    reduced = half.MixedPrecision(calibrated.module, half.DTYPES["fp16"], units)
    graph = calibrated.path("fp16", "onnx")
    calibrated.write_onnx(reduced.eval(), graph)
    return graph


def test_a_transformer(in_half, calibrated, tmp_path):
    path = tmp_path / "gpu.onnx"
    assert fuse_attention(in_half, path, gpu=True) == 2
    found = operators(path)
    fused = {"Attention": 2, "BiasGelu": 3, "SkipLayerNormalization": 5}  # with the adapter's
    assert {name: found[name] for name in fused} == fused
    assert not {"MultiHeadAttention", "Gelu", "Conv"} & found.keys()
    assert found["Transpose"] == 1
    images = calibrated.reference.inputs["images"]
    for count in (1, 5):
        got, expected = (load_runtime(f, device="cpu")(images[:count]) for f in (path, in_half))
        assert np.abs(got - expected).max() < 0.01 * np.ptp(expected)


def test_what_is_not_covered_stays(tmp_path):
    """Weights that are no constants, tanh's GELU, and a transposition without patches."""
    onnx.save(onnx.parser.parse_model(OTHERS), tmp_path / "m.onnx")
    model = onnx_ir.load(tmp_path / "m.onnx")
    before = Counter(node.op_type for node in model.graph)
    fuse_for_gpu(model)
    assert Counter(node.op_type for node in model.graph) == before


def test_a_layer_scale_is_in_the_weights(tmp_path):
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        model (float16[batch, 5, 4] x) => (float16[batch, 5, 4] y, float16[batch, 5, 4] z) {
          product = MatMul(x, w)
          branch = Add(product, b)
          scaled = Mul(branch, g)
          total = Add(x, scaled)
          normal = LayerNormalization <axis = -1, epsilon = 1e-6> (total, g, b)
          y = Relu(normal)
          z = Relu(total)
        }"""
    )
    for name, shape in (("w", (4, 4)), ("b", (4,)), ("g", (4,))):
        array = rng.normal(size=shape).astype(np.float16)
        graph.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(graph, tmp_path / "m.onnx")
    model = onnx_ir.load(tmp_path / "m.onnx")
    fuse_for_gpu(model)
    onnx_ir.save(model, tmp_path / "gpu.onnx")
    expected = {"MatMul": 1, "SkipLayerNormalization": 1, "Relu": 2}
    assert operators(tmp_path / "gpu.onnx") == expected
    x = rng.normal(size=(3, 5, 4)).astype(np.float16)
    found, expected = (
        onnxruntime.InferenceSession(tmp_path / name).run(None, {"x": x})
        for name in ("gpu.onnx", "m.onnx")
    )
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one.astype(float) - other).max() < 0.01 * np.ptp(other)
