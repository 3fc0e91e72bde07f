import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

import fastadapt as fa
from fastadapt import cli
from fastadapt.export import EngineOptions, verify_bundle
from fastadapt.export.artefact import REFUSED, VERIFIED
from fastadapt.export.backends import openvino as backend
from fastadapt.export.bundle import build as engines
from fastadapt.export.bundle import int8_files
from fastadapt.export.bundle.build import build_artefacts
from fastadapt.export.precision.int8 import Judgement
from fastadapt.export.precision.quantizer import graph_layers
from fastadapt.export.runtimes import RuntimeUnavailable, load_runtime
from fastadapt.export.settings import Batches
from tests.helpers.imagesets import make_folders

pytest.importorskip("openvino")


def test_fp32(calibrated):
    _, artefact = build_artefacts(EngineOptions(openvino=True, batch=Batches(1, 2, 4)), calibrated)
    assert (artefact.kind, artefact.path, artefact.status) == (
        "openvino",
        "model.fp32.xml",
        VERIFIED,
    )
    assert artefact.files == ("model.fp32.xml", "model.fp32.bin")
    assert [p.batch for p in artefact.parity] == [1, 2, 3, 4]
    assert artefact.details["library"] == "OpenVINO"
    names = {file.name for file in calibrated.folder.iterdir()}
    assert names == {"model.onnx", *artefact.files}

    runtime = load_runtime(calibrated.folder / artefact.path, threads=1)
    expected = load_runtime(calibrated.onnx)
    images = calibrated.reference.inputs["images"]
    first = runtime(images[:3])
    kept = first.copy()
    tensors = runtime(torch.from_numpy(images[3:8]))
    np.testing.assert_array_equal(first, kept)  # a later call leaves earlier results alone
    outputs = np.concatenate([first, tensors.numpy()])
    np.testing.assert_allclose(outputs, expected(images), rtol=1e-4, atol=1e-5)


def judged(monkeypatch, problems, accuracies=()):
    """The tests' model is too small to be faster in INT8: what is decided elsewhere is given."""

    def judge(fp32, quantized, images, *, rival, **settings):
        assert rival[1].name == "model.fp32.xml"
        accuracy = next(left, 0.8)
        found = problems if accuracy == 0.8 else ("accuracy falls",)
        return replace(judgement, accuracy=accuracy, problems=found)

    left = iter(accuracies)
    judgement = Judgement(0.8, 0.8, 0.01, 30, 20, 8, 100, "accuracy", "OpenVINO, CPU")
    monkeypatch.setattr(int8_files, "judge", judge)
    # ONNX Runtime's own INT8 has its tests elsewhere.
    monkeypatch.setattr(engines, "build_int8", lambda *args: None)
    monkeypatch.setattr(engines, "_tell", lambda console, artefact: None)


def test_int8(calibrated, monkeypatch):
    pytest.importorskip("nncf")
    judged(monkeypatch, ())
    options = EngineOptions(openvino=True, int8=True, batch=Batches(1, 2, 4))
    artefact = build_artefacts(options, calibrated)[2]
    assert (artefact.path, artefact.precision) == ("model.int8.xml", "int8"), artefact.reason
    assert artefact.status == VERIFIED, artefact.reason
    text = (calibrated.folder / artefact.path).read_text()
    assert "FakeQuantize" in text
    products = [op for op in operators(calibrated.folder / artefact.path) if is_product(op)]
    heads = [op for op in products if op.get_friendly_name().endswith(backend.WITHOUT_BIAS)]
    assert len(heads) == 1 and not takes_int8(heads[0])
    assert any(map(takes_int8, products))
    weights = (calibrated.folder / "model.int8.bin").stat().st_size
    assert weights < (calibrated.folder / "model.fp32.bin").stat().st_size


def test_int8_with_layers_in_fp32(calibrated, monkeypatch):
    pytest.importorskip("nncf")
    judged(monkeypatch, (), accuracies=[0.7])
    options = EngineOptions(openvino=True, int8=True, batch=Batches(1, 2, 4))
    artefact = build_artefacts(options, calibrated)[2]
    assert artefact.status == VERIFIED, artefact.reason
    assert artefact.details["tried"] == ["0 layers in fp32: accuracy falls"]
    kept = artefact.details["fp32_layers"]
    assert len(kept) == 2
    nodes = [n for name in kept for n in graph_layers(onnx.load(calibrated.onnx).graph)[name]]
    found = {
        op.get_friendly_name().removesuffix(backend.WITHOUT_BIAS): takes_int8(op)
        for op in operators(calibrated.folder / artefact.path)
        if is_product(op) or op.get_type_name() == "Convolution"
    }
    assert not any(found[name] for name in nodes)
    assert any(found.values())


def operators(path):
    return backend.load_openvino().Core().read_model(path).get_ops()


def is_product(op):
    return op.get_type_name() == "MatMul"


def takes_int8(op):
    return op.input_value(0).get_node().get_type_name() == "FakeQuantize"


def test_int8_that_is_refused_leaves_nothing(calibrated, monkeypatch):
    pytest.importorskip("nncf")
    judged(monkeypatch, ("accuracy falls",))
    artefact = build_artefacts(EngineOptions(openvino=True, int8=True), calibrated)[2]
    assert (artefact.status, artefact.path, artefact.files) == (REFUSED, None, ())
    names = {file.name for file in calibrated.folder.iterdir()}
    assert names == {"model.onnx", "model.fp32.xml", "model.fp32.bin"}


def test_a_bundle_runs_it(made, tmp_path, monkeypatch, quick):
    bundle = tmp_path / "b"
    arguments = ["export", made / "run", "--out", bundle, "--openvino", "--no-speed"]
    monkeypatch.setattr(sys, "argv", ["fastadapt", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert verify_bundle(bundle, speed=False).passed
    make_folders(tmp_path / "images", per_class=1)
    files = sorted((tmp_path / "images").rglob("*.png"))
    expected = fa.export.load(bundle, "model.onnx")(files)
    predicted = fa.export.load(bundle, "model.fp32.xml")(files)
    assert predicted.labels == expected.labels
    np.testing.assert_allclose(predicted.logits, expected.logits, rtol=1e-3, atol=1e-4)

    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["model.fp32.bin"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(fa.InputError):
        fa.export.load(bundle, "model.fp32.xml")


def test_refused(calibrated, tmp_path, monkeypatch):
    with pytest.raises(fa.InputError, match=r"OpenVINO cannot convert damaged\.onnx: "):
        (tmp_path / "damaged.onnx").write_bytes(b"no graph")
        backend.convert(tmp_path / "damaged.onnx", tmp_path / "m.xml", Batches())
    assert not list(tmp_path.glob("*m.xml*"))
    (tmp_path / "m.xml").write_text("<net/>")
    with pytest.raises(fa.InputError, match=r"OpenVINO cannot load m\.xml: "):
        load_runtime(tmp_path / "m.xml")
    with pytest.raises(RuntimeUnavailable, match="runs it on the CPU"):
        load_runtime(tmp_path / "m.xml", device="cuda")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeUnavailable, match=r"pip install 'fastadapt\[openvino\]'"):
        load_runtime(tmp_path / "m.xml")
    with pytest.raises(fa.InputError, match=r"openvino is not installed: pip install"):
        EngineOptions(openvino=True).check()


def test_its_telemetry_stays_out(tmp_path):
    code = (
        "import sys\n"
        "from fastadapt.export.backends.openvino import load_openvino\n"
        "load_openvino().Core()\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
    )
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
    assert not (tmp_path / "intel").exists()
