"""Biases that make up for rounded weights: a graph of two convolutions, one by groups."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fastadapt.export.precision.bias_correction import (
    InputMeans,
    convolutions,
    correct_biases,
    corrected_module,
    output_shifts,
    rounding_error,
)
from fastadapt.export.precision.quantizer import (
    Quantization,
    calibrate,
    graph_layers,
    quantize_static,
)
from fastadapt.export.runtimes import load_runtime

CHANNELS = 4


@pytest.fixture
def given(tmp_path):
    """A graph, of which the first convolution has no bias, and images that are never negative."""
    rng = np.random.default_rng(0)
    weights = {
        "model.first.weight": rng.normal(size=(CHANNELS, 3, 1, 1)),
        "model.second.weight": rng.normal(size=(2 * CHANNELS, 1, 3, 3)),
        "model.second.bias": rng.normal(size=2 * CHANNELS),
    }
    sizes = (["batch", 3, 8, 8], ["batch", 2 * CHANNELS, 6, 6])
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "model.first.weight"], ["a"], "one"),
            helper.make_node("Relu", ["a"], ["b"], "relu"),
            helper.make_node(
                "Conv",
                ["b", "model.second.weight", "model.second.bias"],
                ["y"],
                "two",
                group=CHANNELS,
            ),
        ],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, sizes[0])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes[1])],
        [numpy_helper.from_array(x.astype(np.float32), name) for name, x in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    # Nearly uniform images, as of cells or slides, whose errors are all alike.
    images = rng.uniform(0.7, 0.8, size=(24, 3, 8, 8)).astype(np.float32)
    return tmp_path, model, np.split(images, [16])


def test_shifts_are_those_of_rounded_weights(given):
    folder, model, batches = given
    observed = InputMeans(model, folder)
    for batch in batches:
        observed.add(batch)
    images = np.concatenate(batches)
    np.testing.assert_allclose(observed.means["images"], images.mean((0, 2, 3)), rtol=1e-5)
    shifts = output_shifts(model, observed.means)
    assert {name: shift.shape for name, shift in shifts.items()} == {"a": (4,), "y": (8,)}

    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in rounded.graph.initializer}
    second = numpy_helper.to_array(tensors["model.second.weight"])
    changed = (second + rounding_error(second)).astype(np.float32)
    tensors["model.second.weight"].CopyFrom(numpy_helper.from_array(changed, "model.second.weight"))
    onnx.save(rounded, folder / "rounded.onnx")
    outputs = [
        load_runtime(folder / f"{n}.onnx", device="cpu")(images) for n in ("model", "rounded")
    ]
    measured = (outputs[1] - outputs[0]).mean((0, 2, 3))
    np.testing.assert_allclose(shifts["y"], measured, atol=2e-2 * np.abs(measured).max())

    correct_biases(model, shifts)
    first, second = convolutions(model)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_allclose(tensors[first.input[2]], -shifts["a"], rtol=1e-6)
    assert second.input[2] in tensors and "model.second.bias" not in tensors


def test_a_channel_without_weights():
    assert not rounding_error(np.zeros((2, 3, 1, 1))).any()


def test_quantised_outputs_are_nearer(given, monkeypatch):
    folder, _, batches = given
    images = np.concatenate(batches)
    expected = load_runtime(folder / "model.onnx", device="cpu")(images)
    wanted = Quantization("QUInt8", "QInt8")

    def shift():
        quantize_static(folder / "model.onnx", folder / "q.onnx", iter(batches), wanted)
        found = load_runtime(folder / "q.onnx", device="cpu")(images)
        return np.abs((found - expected).mean((0, 2, 3))).max()

    corrected = shift()
    assert sorted(file.name for file in folder.iterdir()) == ["model.onnx", "q.onnx"]
    monkeypatch.setattr("fastadapt.export.precision.quantizer.output_shifts", lambda *_: {})
    assert corrected < 0.5 * shift()


def test_a_module_is_corrected_by_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4))
    weights = [layer.weight.detach().numpy() for layer in (model[0], model[2])]
    merged = weights[1] * (1 + 1e-6)  # as batch norms that others merge
    found = corrected_module(model, [(weights[0], np.arange(4.0)), (merged, np.ones(8))])
    assert found[0].bias.tolist() == [0, -1, -2, -3]
    torch.testing.assert_close(found[2].bias, model[2].bias - 1)
    assert model[0].bias is None
    others = corrected_module(
        model, [(1.01 * weights[0], np.ones(4)), (weights[1][1:], np.ones(7))]
    )
    assert others[0].bias is None
    torch.testing.assert_close(others[2].bias, model[2].bias)


def test_layers_that_stay_in_fp32(given):
    folder, model, batches = given
    assert graph_layers(model.graph) == {"first": ["one", "relu"], "second": ["two"]}
    found = calibrate(folder / "model.onnx", batches, Quantization("QUInt8", "QInt8"))
    found.write(folder / "q.onnx", keep=["second"])
    graph = onnx.load(folder / "q.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    second = next(node for node in graph.node if node.name == "two")
    assert tensors[second.input[1]].data_type == TensorProto.FLOAT
    assert second.input[2] == "model.second.bias"  # as its weights are not rounded
    first = next(node for node in graph.node if node.name == "one")
    assert first.input[1].endswith("DequantizeLinear_Output")
