import sys

import pytest
import torch

import fastadapt as fa
from fastadapt.export import EngineOptions
from fastadapt.export.backends import executorch as backend
from fastadapt.export.runtimes import RuntimeUnavailable, load_runtime
from fastadapt.export.settings import Batches
from tests.helpers.edge_files import check_bundle, check_file, check_refused


def test_the_file(calibrated, capfd):
    pytest.importorskip("executorch")
    check_file(calibrated, "executorch", "pte", capfd)


def test_a_bundle_runs_it(made, tmp_path, monkeypatch):
    pytest.importorskip("executorch")
    check_bundle(made, tmp_path, monkeypatch, "executorch", "pte")


def test_batches_on_both_sides_of_pytorchs_choice(tmp_path):
    """From 16 images on PyTorch has another convolution than for the example of eight."""
    pytest.importorskip("executorch")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU()).eval()
    images = torch.rand(20, 3, 6, 6)
    backend.convert(model, (images[:1],), tmp_path / "m.pte", Batches(1, 8, 20))
    outputs = load_runtime(tmp_path / "m.pte", device="cpu")(images)
    torch.testing.assert_close(outputs, model(images).detach(), rtol=1e-5, atol=1e-6)


def test_refused(tmp_path):
    pytest.importorskip("executorch")
    check_refused(backend, "ExecuTorch", tmp_path / "m.pte")


def test_without_it(tmp_path, monkeypatch):
    (tmp_path / "m.pte").write_bytes(b"a program")
    with pytest.raises(RuntimeUnavailable, match="is for ExecuTorch, which runs it on the CPU"):
        load_runtime(tmp_path / "m.pte", device="cuda")
    hide(monkeypatch)
    with pytest.raises(RuntimeUnavailable, match=r"pip install 'fastadapt\[executorch\]'"):
        load_runtime(tmp_path / "m.pte")
    with pytest.raises(
        fa.InputError, match=r"is not installed: pip install 'fastadapt\[executorch\]'"
    ):
        EngineOptions(executorch=True).check()


def hide(monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
