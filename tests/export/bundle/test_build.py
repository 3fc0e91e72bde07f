import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fastadapt as fa
from fastadapt import cli
from fastadapt.export import EngineOptions, export_run, verify_bundle
from fastadapt.export.artefact import FAILED, REFUSED, UNVERIFIED, VERIFIED, Artefact
from fastadapt.export.bundle import build as engines
from fastadapt.export.bundle import int8_files
from fastadapt.export.bundle.build import build_artefacts, rebuild_artefact
from fastadapt.export.bundle.verify_artefact import artefact_problems
from fastadapt.export.parity import GateError
from fastadapt.export.precision.int8 import Judgement
from fastadapt.export.settings import Batches

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture
def folded(folded_model, tmp_path):
    """In a folder of its own."""
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(folded_model.onnx.read_bytes())
    return replace(folded_model, folder=tmp_path, onnx=onnx)


class TestBuild:
    def test_nothing_asked_for(self, folded):
        (onnx,) = build_artefacts(EngineOptions(), folded)
        assert (onnx.path, onnx.status, onnx.files) == ("model.onnx", VERIFIED, ("model.onnx",))

    @no_gpu
    def test_half_precision_and_an_engine(self, folded):
        options = EngineOptions(
            trt=True, precision="fp16", batch=Batches(1, 2, 4), targets=("sm_89",)
        )
        onnx, half, engine = found = build_artefacts(options, folded)
        assert artefact_problems(found) == []
        assert onnx.status == VERIFIED
        assert [p.batch for p in onnx.parity] == [1, 2, 3, 4]
        # In fp16 arithmetic it ran in PyTorch; what ONNX Runtime does on a CPU is fp32.
        assert (half.path, half.status) == ("model.fp16.onnx", UNVERIFIED)
        assert [p.stage for p in half.parity[:2]] == ["fp16 in PyTorch", "ONNX Runtime, CPU"]
        assert half.details["fp32_layers"] == []
        assert half.details["taken_by"]["tensorrt"] == "10.3 or newer"
        # What cannot run here is never called good.
        assert (engine.kind, engine.status) == ("tensorrt_rtx", UNVERIFIED)
        assert "needs a GPU (sm_89)" in engine.reason
        assert engine.files == ("model.fp16.engine", "model.fp16.engine.json")
        assert engine.details["onnx"] == "model.fp16.onnx"
        assert {p.name for p in folded.folder.iterdir()} == {
            name for artefact in found for name in artefact.files
        }
        json.dumps([artefact.to_dict() for artefact in found])

    def test_a_wrong_half_graph_fails(self, folded, monkeypatch):
        def wrong(module, path, **kwargs):
            module.model.head.bias.data += torch.tensor([1.0, 0, 0, 0])
            return folded.write_onnx(module, path, **kwargs)

        found = build_artefacts(EngineOptions(precision="fp16"), replace(folded, write_onnx=wrong))
        assert found[1].status == FAILED
        assert artefact_problems(found)[0].startswith("model.fp16.onnx: at batch 1: error ")

    @no_gpu
    def test_an_engine_is_rebuilt_from_its_graph(self, folded):
        options = EngineOptions(trt=True, batch=Batches(1, 2, 4), targets=("sm_120",))
        engine = build_artefacts(options, folded)[-1]
        (folded.folder / engine.path).write_bytes(b"of another machine")
        fresh = rebuild_artefact(folded.folder, engine, folded.reference)
        assert (folded.folder / engine.path).stat().st_size > 10_000
        assert fresh.status == UNVERIFIED
        assert "sm_89" in fresh.details["targets"]
        assert fresh.details["batch"] == {"min": 1, "opt": 2, "max": 4}
        with pytest.raises(fa.InputError, match=r"model\.onnx cannot be rebuilt here"):
            onnx = Artefact("onnx", "model.onnx", "fp32", VERIFIED)
            rebuild_artefact(folded.folder, onnx, folded.reference)


class TestInt8:
    """The refusal; what the quantiser makes of a real model is in precision/test_int8.py."""

    def run(self, folded, monkeypatch, problems):
        class Layers:
            """No layer is left to keep in fp32."""

            nodes = ()
            calibrated = SimpleNamespace(
                write=lambda path, keep: path.write_bytes(folded.onnx.read_bytes())
            )

        judgement = Judgement(0.8, 0.9, 0.01, 30, 20, 8, 100, "accuracy", "ONNX Runtime, CPU")
        judgement = Judgement(**{**judgement.to_dict(), "problems": problems})
        monkeypatch.setattr(engines, "Int8Layers", lambda *args: Layers())
        monkeypatch.setattr(int8_files, "judge", lambda *args, **kwargs: judgement)
        return build_artefacts(EngineOptions(int8=True), folded)[-1]

    def test_refused_with_the_numbers(self, folded, monkeypatch):
        artefact = self.run(folded, monkeypatch, ("accuracy falls",))
        assert (artefact.path, artefact.status, artefact.files) == (None, REFUSED, ())
        assert artefact.reason == "accuracy falls"
        assert artefact.details["judgement"]["accuracy_fp32"] == 0.9
        assert [p.name for p in folded.folder.iterdir()] == ["model.onnx"]
        assert artefact_problems([artefact]) == []

    def test_accepted(self, folded, monkeypatch):
        artefact = self.run(folded, monkeypatch, ())
        assert (artefact.path, artefact.status) == ("model.int8.onnx", VERIFIED)

    def test_needs_classes(self, folded):
        with pytest.raises(fa.InputError, match="this model has no classes"):
            build_artefacts(
                EngineOptions(int8=True),
                replace(folded, reference=replace(folded.reference, classes=False)),
            )


@no_gpu
class TestBundle:
    def test_engines_of_a_bundle(self, made, tmp_path, monkeypatch):
        bundle = tmp_path / "b"
        arguments = ["export", made / "run", "--out", bundle, "--trt", "--precision", "fp16"]
        arguments += ["--target", "sm_89,sm_120", "--batch", "1:2:4", "--no-speed"]
        monkeypatch.setattr(sys, "argv", ["fastadapt", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
        result = verify_bundle(bundle, speed=False)
        assert result.passed
        assert {a.path: a.status for a in result.artefacts} == {
            "model.onnx": VERIFIED,
            "model.fp16.onnx": UNVERIFIED,
            "model.fp16.engine": UNVERIFIED,
        }

    def test_what_fails_rejects_it(self, made, tmp_path, monkeypatch):
        def wrong(options, folded, console):
            return [Artefact("onnx", "model.onnx", "fp32", FAILED, "at batch 4: error 1")]

        monkeypatch.setattr("fastadapt.export.bundle.pipeline.build_artefacts", wrong)
        with pytest.raises(GateError, match=r"rejected: model\.onnx: at batch 4"):
            export_run(made / "run", tmp_path / "b", speed=False)
        assert (tmp_path / "b.rejected").is_dir()
