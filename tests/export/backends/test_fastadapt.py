"""Fastadapt's own runtime from the folded model to a verified bundle and its predictions."""

import numpy as np
import pytest
import timm

import fastadapt as fa
from fastadapt.errors import InputError
from fastadapt.export import export_run
from fastadapt.export.artefact import REFUSED, VERIFIED
from fastadapt.export.backends import fastadapt as backend
from fastadapt.export.bundle.build import build_artefacts
from fastadapt.export.bundle.engine_options import EngineOptions
from fastadapt.export.bundle.verify import verify_bundle
from fastadapt.export.settings import Batches
from tests.export.fused.test_convert import deployed

NAME = "model.bf16.safetensors"


def test_a_bundle_holds_it_verified_and_predicts_with_it(made, run, quick, tmp_path):
    options = EngineOptions(fused=True, batch=Batches(1, 2, 5))
    result = export_run(run, tmp_path / "bundle", engines=options)
    found = next(a for a in result.manifest["artefacts"] if a["kind"] == "fastadapt")
    assert (found["path"], found["status"], found["precision"]) == (NAME, VERIFIED, "bf16")
    assert found["files"] == [NAME, f"{NAME}.json"] and "steps" not in found["details"]
    assert list(found["speed"]) == ["fastadapt (plain PyTorch), CPU"]
    verified = verify_bundle(tmp_path / "bundle", speed=False)
    assert [a.status for a in verified.artefacts] == [VERIFIED, VERIFIED]
    predict = fa.export.load(tmp_path / "bundle", file=NAME, device="cpu")
    image = made / "images" / "good" / "1.png"
    other = fa.export.load(tmp_path / "bundle", file="model.onnx", device="cpu")
    np.testing.assert_allclose(predict(image).probabilities, other(image).probabilities, atol=0.02)


def test_one_that_is_too_inexact_is_refused_and_deleted(folded_model, monkeypatch):
    real = backend.fuse

    def wrong(model, dtype):
        fused = real(model, dtype)
        fused.steps[-1].bias.add_(9.0)
        return fused

    monkeypatch.setattr(backend, "fuse", wrong)
    *_, found = build_artefacts(EngineOptions(fused=True), folded_model)
    assert (found.path, found.status, found.precision) == (None, REFUSED, "bf16")
    assert "at batch" in found.reason
    assert not (folded_model.folder / NAME).exists()


def test_other_models_are_refused_in_one_line(tmp_path):
    model = deployed(timm.create_model("test_resnet", num_classes=0))
    with pytest.raises(InputError, match=r"`fused` takes timm's .* the backbone is a ResNet"):
        backend.build_fused(model, tmp_path / NAME)
    with pytest.raises(InputError, match="with its graph's input before it"):
        backend.build_fused(model.model, tmp_path / NAME)
