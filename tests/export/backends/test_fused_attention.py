"""Fused attention: the graph, and the file of a bundle that must be worth it."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

import fastadapt as fa
from fastadapt.export import EngineOptions, export_run
from fastadapt.export.artefact import REFUSED, UNVERIFIED, VERIFIED
from fastadapt.export.backends.fused_attention import fuse_attention
from fastadapt.export.bundle import build
from fastadapt.export.bundle.verify import verify_bundle
from fastadapt.export.precision import half
from fastadapt.export.runtimes import load_runtime

CONVOLUTION = """<ir_version: 10, opset_import: ["": 20]>
model (float[batch, 3, 8, 8] images) => (float[batch, 3, 8, 8] maps) { maps = Relu(images) }"""


@pytest.fixture
def speeds(monkeypatch):
    """Those of the plain file and the fused one."""
    found = [10.0, 20.0]
    monkeypatch.setattr(build, "speeds_in_turns", lambda runtimes, *example: found)
    return found


def test_every_layer_is_one_operator(folded_model, tmp_path):
    path = tmp_path / "fused.onnx"
    assert fuse_attention(folded_model.onnx, path) == 2
    plain, model = onnx.load(folded_model.onnx), onnx.load(path)
    foreign = [(n.domain, n.op_type) for n in model.graph.node if n.domain]
    assert foreign == [("com.microsoft", "MultiHeadAttention")] * 2
    softmaxes = [sum(n.op_type == "Softmax" for n in m.graph.node) for m in (plain, model)]
    assert softmaxes[1] == softmaxes[0] - 2
    assert {o.domain: o.version for o in model.opset_import} == {"": 20, "com.microsoft": 1}
    assert model.metadata_props == plain.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    images = folded_model.reference.inputs["images"]
    for count in (1, 5):
        found, expected = (
            load_runtime(file, device="cpu")(images[:count]) for file in (path, folded_model.onnx)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_attention_or_is_no_graph(tmp_path):
    onnx.save(onnx.parser.parse_model(CONVOLUTION), tmp_path / "m.onnx")
    assert fuse_attention(tmp_path / "m.onnx", tmp_path / "fused.onnx") == 0
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(fa.InputError, match=r"attention of broken\.onnx cannot be fused: "):
        fuse_attention(tmp_path / "broken.onnx", tmp_path / "fused.onnx")
    assert not (tmp_path / "fused.onnx").exists()


def build_fused(model, precision="fp32", graph=None):
    variant = build.Variant(model.module, precision, graph or model.onnx, {})
    return build._build_fused(EngineOptions(), model, variant)


def test_is_refused_where_it_is_not_worth_it(calibrated, speeds, monkeypatch):
    speeds[1] = 10.4
    refused = build_fused(calibrated)
    assert (refused.path, refused.status, refused.files) == (None, REFUSED, ())
    assert refused.reason.startswith("10.4 images/s at batch 8 where model.onnx has 10 (ONNX Run")
    fused = build.fuse_attention

    def wrong(source, path, gpu):
        count = fused(source, path)
        model = onnx.load(path)
        weight = next(t for t in model.graph.initializer if t.name.endswith("head.weight"))
        weight.CopyFrom(
            onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name)
        )
        onnx.save(model, path)
        return count

    monkeypatch.setattr(build, "fuse_attention", wrong)
    refused = build_fused(calibrated)
    assert refused.status == REFUSED and "error" in refused.reason
    monkeypatch.setattr(build, "fuse_attention", lambda source, path, gpu: 0)
    assert build_fused(calibrated).reason == "there is no attention that ONNX Runtime fuses"
    assert [file.name for file in calibrated.folder.iterdir()] == ["model.onnx"]


def test_half_precision_waits_for_a_gpu(calibrated, speeds):
    reduced = half.MixedPrecision(
        calibrated.module,
        half.DTYPES["fp16"],
        half.precision_units(calibrated.module, calibrated.example[0]),
    )
    graph = calibrated.path("fp16", "onnx")
    calibrated.write_onnx(reduced.eval(), graph)
    loose = replace(calibrated, reference=replace(calibrated.reference, classes=False))
    found = build_fused(loose, "fp16", graph)
    assert (found.path, found.status) == ("model.fp16.fused.onnx", UNVERIFIED), found.reason
    assert found.details["fused_attention"] == 2


def test_in_a_bundle(made, quick, tmp_path, speeds, no_speed):
    options = EngineOptions(fused_attention=True)
    export_run(made / "run", tmp_path / "b", engines=options, speed=False)
    found = {a.path: a for a in verify_bundle(tmp_path / "b", speed=False).artefacts}
    assert found["model.fp32.fused.onnx"].status == VERIFIED
    report = (tmp_path / "b" / "report.html").read_text()
    assert "layers with fused attention" in report
    assert found["model.fp32.fused.onnx"].details["taken_by"] == {
        "onnxruntime": "1.17 or newer",
        "tensorrt": "MultiHeadAttention of com.microsoft: not in TensorRT 10.3",
    }
    assert "<td>MultiHeadAttention of com.microsoft: not in TensorRT 10.3</td>" in report
    with pytest.raises(fa.InputError, match="`resize` is for the fp32 ONNX file alone"):
        export_run(made / "run", tmp_path / "c", engines=options, resize=True)
