"""Fastadapt's own runtime from the folded model to a verified bundle and its predictions."""

from dataclasses import replace

import numpy as np
import pytest
import timm

import fastadapt as fa
from fastadapt.errors import InputError
from fastadapt.export import export_run
from fastadapt.export.artefact import REFUSED, VERIFIED
from fastadapt.export.backends import fastadapt as backend
from fastadapt.export.bundle import build, engine_options
from fastadapt.export.bundle.build import build_artefacts
from fastadapt.export.bundle.engine_options import EngineOptions
from fastadapt.export.bundle.verify import verify_bundle
from fastadapt.export.precision import fallback, int8
from fastadapt.export.runtimes import load_runtime
from fastadapt.export.settings import Batches
from fastadapt.files import read_json
from tests.export.fused.test_convert import deployed

NAME, FP8 = "model.bf16.safetensors", "model.fp8.safetensors"


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


class TestFloat8:
    """A file in FP8 beside the one in bf16, as a GPU would make it."""

    @pytest.fixture
    def rates(self, monkeypatch):
        """Claim a GPU with FP8, on which the file is twice as fast."""
        found = [10.0, 20.0]
        monkeypatch.setattr(engine_options.fp8, "check_gpu", lambda: None)
        monkeypatch.setattr(int8, "speeds_in_turns", lambda runtimes, example: tuple(found))
        return found

    def test_is_verified_and_runs(self, calibrated, rates):
        options = EngineOptions(fused=True, fp8=True, fp8_budget=0.5, batch=Batches(1, 2, 4))
        options.check()
        *_, bf16, found = build_artefacts(options, calibrated)
        assert (bf16.path, bf16.status) == (NAME, VERIFIED)
        assert (found.path, found.status, found.precision) == (FP8, VERIFIED, "fp8")
        assert found.files == (FP8, f"{FP8}.json") and found.details["bf16_steps"] == []
        assert len(found.details["fp8_layers"]) == 6
        assert found.details["judgement"]["rival"] == "bf16"
        inputs = calibrated.reference.inputs["images"]
        exact, rounded = (load_runtime(calibrated.folder / f)(inputs) for f in (NAME, FP8))
        assert 0 < np.abs(exact - rounded).max() < 0.2 * np.ptp(exact)

    def test_not_faster_is_refused(self, calibrated, rates):
        rates[1] = 10.0
        *_, found = build_artefacts(EngineOptions(fused=True, fp8=True, fp8_budget=0.5), calibrated)
        assert (found.path, found.status) == (None, REFUSED) and "not faster" in found.reason
        assert not (calibrated.folder / FP8).exists()

    def test_steps_that_cost_accuracy_stay_in_bf16(self, calibrated, rates, monkeypatch):
        real = build.judge

        def judged(fp32, path, images, **how):
            names = read_json(path.with_name(f"{path.name}.json"))["fp8_layers"]
            judgement = real(fp32, path, images, **how)
            if any(name.startswith("2.") for name in names):
                judgement = replace(judgement, accuracy=0.1, problems=("falls",))
            return judgement

        monkeypatch.setattr(build, "judge", judged)
        monkeypatch.setattr(fallback, "FIRST", 1)  # of two steps in all
        monkeypatch.setattr(backend.Float8Steps, "ranked", ["2", "1"])
        *_, found = build_artefacts(EngineOptions(fused=True, fp8=True, fp8_budget=0.5), calibrated)
        assert found.status == VERIFIED and found.details["bf16_steps"] == [2]
        assert found.details["tried"] == ["0 blocks in bf16: falls"]
        assert {name[0] for name in found.details["fp8_layers"]} == {"1"}
