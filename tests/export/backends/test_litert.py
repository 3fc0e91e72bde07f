import importlib.util
import sys

import numpy as np
import pytest

import fastadapt as fa
from fastadapt.export import EngineOptions
from fastadapt.export.backends import litert as backend
from fastadapt.export.runtimes import RuntimeUnavailable, load_runtime
from fastadapt.export.settings import Batches
from tests.helpers.edge_files import check_bundle, check_file, check_int8, check_refused


def test_the_file(calibrated, capfd):
    pytest.importorskip("litert_torch")
    check_file(calibrated, "litert", "tflite", capfd)


def test_int8(calibrated, monkeypatch):
    pytest.importorskip("litert_torch")
    check_int8(calibrated, "litert", "tflite", monkeypatch)
    file = backend.load_litert().Interpreter(str(calibrated.folder / "model.int8.tflite"))
    dtypes = {tuple(t["shape"]): t["dtype"] for t in file.get_tensor_details()}
    assert dtypes[4, 48] == np.float32 and dtypes[144, 48] == np.int8  # head; q, k and v
    kept = [x.numpy() for n, x in calibrated.module.state_dict().items() if "qkv.weight" in n]
    fp32, path = (calibrated.folder / f"{name}.tflite" for name in ("model.fp32", "model"))
    images = [calibrated.reference.inputs["images"]]
    backend.quantize(fp32, path, images, Batches(), fp32_weights=kept)
    file = backend.load_litert().Interpreter(str(path))
    dtypes = {tuple(t["shape"]): t["dtype"] for t in file.get_tensor_details()}
    assert dtypes[144, 48] == np.float32 and dtypes[192, 48] == np.int8  # the MLP's
    path.write_bytes(b"no file")
    with pytest.raises(fa.InputError, match=r"quantiser cannot quantise model\.tflite: ") as caught:
        backend.quantize(path, path, [], Batches())
    assert "\n" not in str(caught.value)


def test_a_bundle_runs_it(made, tmp_path, monkeypatch):
    pytest.importorskip("litert_torch")
    check_bundle(made, tmp_path, monkeypatch, "litert", "tflite")


def test_refused(tmp_path):
    pytest.importorskip("litert_torch")
    check_refused(backend, "LiteRT", tmp_path / "m.tflite")


def test_without_it(tmp_path, monkeypatch):
    (tmp_path / "m.tflite").write_bytes(b"a program")
    with pytest.raises(RuntimeUnavailable, match="is for LiteRT, which runs it on the CPU"):
        load_runtime(tmp_path / "m.tflite", device="cuda")
    hide(monkeypatch)
    with pytest.raises(RuntimeUnavailable, match=r"pip install 'fastadapt\[litert\]'"):
        load_runtime(tmp_path / "m.tflite")
    with pytest.raises(fa.InputError, match="is not installed: pip install"):
        EngineOptions(litert=True).check()


def test_int8_without_its_library(monkeypatch):
    pytest.importorskip("litert_torch")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "quantizer" in name else found(name)
    )
    EngineOptions(litert=True).check()
    with pytest.raises(fa.InputError, match="ai-edge-quantizer is not installed: pip install"):
        EngineOptions(litert=True, int8=True).check()


def hide(monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
