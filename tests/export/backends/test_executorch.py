import sys

import pytest
import torch

import fastadapt as fa
from fastadapt.export import EngineOptions
from fastadapt.export.backends import executorch as backend
from fastadapt.export.runtimes import RuntimeUnavailable, load_runtime
from fastadapt.export.settings import Batches
from tests.helpers.edge_files import check_bundle, check_file, check_int8, check_refused


def test_the_file(calibrated, capfd):
    pytest.importorskip("executorch")
    check_file(calibrated, "executorch", "pte", capfd)


def test_int8(calibrated, monkeypatch):
    pytest.importorskip("executorch")
    check_int8(calibrated, "executorch", "pte", monkeypatch)


def test_int8_of_a_fixed_batch_and_of_convolutions(tmp_path):
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
    ).eval()
    images = torch.rand(9, 3, 12, 12)
    given = [part.numpy() for part in images.split(5)]  # parts that fill no batch
    backend.quantize(model, (images[:1],), tmp_path / "m.pte", given, Batches(4, 4, 4))
    outputs = load_runtime(tmp_path / "m.pte", device="cpu")(images[:4])
    expected = model(images[:4]).detach()
    error = (outputs - expected).abs().max()
    assert 0 < error < 0.05 * expected.std()
    kept = [layer.weight.detach().numpy() for layer in (model[0], model[3])]
    example, batch = (images[:1],), Batches(4, 4, 4)
    backend.quantize(model, example, tmp_path / "m.pte", given, batch, fp32_weights=kept)
    outputs = load_runtime(tmp_path / "m.pte", device="cpu")(images[:4])
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


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


def test_int8_without_its_library(monkeypatch):
    pytest.importorskip("executorch")
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    EngineOptions(executorch=True).check()
    with pytest.raises(fa.InputError, match="torchao is not installed: pip install 'fastadapt"):
        EngineOptions(executorch=True, int8=True).check()


def hide(monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.runtime", None)
