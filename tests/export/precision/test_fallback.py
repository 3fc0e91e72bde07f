"""Layers that stay in fp32: which, how many, and what the files of ONNX Runtime make of it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx

from fastadapt.export import EngineOptions
from fastadapt.export.artefact import VERIFIED
from fastadapt.export.bundle import int8_files
from fastadapt.export.bundle.build import build_artefacts
from fastadapt.export.precision.fallback import Int8Layers, keep_layers
from fastadapt.export.precision.int8 import Judgement, QuantizationImages
from fastadapt.export.precision.quantizer import graph_layers

GRAPH = """<ir_version: 10, opset_import: ["": 20]>
model (float[batch, 3, 12, 12] images) => (float[batch, 8] means) {
    [first] a = Conv(images, w_first)
    [relu] b = Relu(a)
    [second] c = Conv(b, w_second)
    [third] d = Conv(c, w_third)
    means = ReduceMean <keepdims = 0> (d, axes)
}"""
GOOD = Judgement(0.9, 0.9, 0.01, 30, 20, 8, 100, "accuracy", "ONNX Runtime, CPU")
BAD = replace(GOOD, accuracy=0.8, problems=("accuracy falls from 90.00% to 80.00%",))


def test_how_many_layers_are_tried():
    layers = SimpleNamespace(ranked=list("gecafbdh"), nodes=dict.fromkeys("abcdefgh"))

    def run(*judgements):
        calls, results = [], iter(judgements)
        found = keep_layers(calls.append, lambda: next(results), layers)
        return ["".join(kept) for kept in calls], found

    calls, found = run(GOOD)
    assert (calls, found.fp32_layers, found.tried) == ([""], (), ())
    # That it is no faster is no matter of accuracy.
    calls, found = run(replace(GOOD, problems=("not faster",)))
    assert (calls, found.judgement.problems) == ([""], ("not faster",))
    calls, found = run(BAD, BAD, GOOD)
    assert calls == ["", "eg", "aceg"]  # in the order they run in
    assert found.to_dict() == {
        "fp32_layers": ["a", "c", "e", "g"],
        "tried": [f"{n} layers in fp32: accuracy falls from 90.00% to 80.00%" for n in (0, 2)],
    }
    calls, found = run(BAD, BAD, BAD)  # half of the layers are the most
    assert (calls[-1], found.judgement) == ("aceg", BAD)


def test_layers_are_ranked_by_what_each_loses(tmp_path):
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(GRAPH)
    shapes = {"first": (8, 3, 3, 3), "second": (8, 8, 1, 1), "third": (8, 8, 1, 1)}
    for name, shape in shapes.items():
        weight = rng.standard_normal(shape).astype(np.float32)
        if name == "first":
            weight[0] = 0  # a channel without values,
        if name == "second":
            weight[:, 0] = 100  # whose weights make all others coarse
        tensor = onnx.numpy_helper.from_array(weight, f"w_{name}")
        model.graph.initializer.append(tensor)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 3]), "axes"))
    onnx.save(model, tmp_path / "model.onnx")
    pixels = rng.random((24, 3, 12, 12), dtype=np.float32)
    images = QuantizationImages(range(24), (), None, lambda files: pixels[list(files)])
    layers = Int8Layers(tmp_path / "model.onnx", lambda: images)
    assert layers.nodes == {"first": ["first", "relu"], "second": ["second"], "third": ["third"]}
    assert layers.ranked[0] == "second"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_file_with_layers_in_fp32(calibrated, monkeypatch):
    results = iter([BAD, GOOD])
    monkeypatch.setattr(int8_files, "judge", lambda *args, **settings: next(results))
    artefact = build_artefacts(EngineOptions(int8=True), calibrated)[-1]
    assert artefact.status == VERIFIED, artefact.reason
    assert artefact.details["tried"] == [f"0 layers in fp32: {BAD.problems[0]}"]
    kept = artefact.details["fp32_layers"]
    assert len(kept) == 2
    layers = graph_layers(onnx.load(calibrated.onnx).graph)
    graph = onnx.load(calibrated.folder / artefact.path).graph
    weights = {tensor.name for tensor in graph.initializer}
    plain = {n.name for n in graph.node if len(n.input) > 1 and n.input[1] in weights}
    for name in layers:
        delicate = name.endswith((".centers", ".transforms"))
        assert (layers[name][0] in plain) == (name in kept or delicate)
