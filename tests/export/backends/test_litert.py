import sys

import pytest

import fastadapt as fa
from fastadapt.export import EngineOptions
from fastadapt.export.backends import litert as backend
from fastadapt.export.runtimes import RuntimeUnavailable, load_runtime
from tests.helpers.edge_files import check_bundle, check_file, check_refused


def test_the_file(calibrated, capfd):
    pytest.importorskip("litert_torch")
    check_file(calibrated, "litert", "tflite", capfd)


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


def hide(monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
