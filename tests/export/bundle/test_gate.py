import shutil

import pytest
from PIL import Image

import fastadapt as fa
from fastadapt.export import export_run, fold, verify_bundle
from fastadapt.export.parity import GateError
from fastadapt.files import read_json
from tests.export.conftest import DESCRIBED
from tests.helpers.command import contents

pytestmark = pytest.mark.usefixtures("no_speed")


class TestGate:
    def test_rejects_a_wrong_file(self, run, made, tmp_path, broken):
        before = shutil.copytree(made / "bundle", tmp_path / "b")
        kept = contents(before)
        with pytest.raises(GateError, match=r"rejected: ONNX Runtime at batch 1: error.*rejected"):
            export_run(run, tmp_path / "b", overwrite=True)
        assert contents(tmp_path / "b") == kept
        rejected = tmp_path / "b.rejected"
        manifest = read_json(rejected / "manifest.json")
        assert not manifest["accepted"]
        assert manifest["problems"][0].startswith("ONNX Runtime at batch 1")
        assert {row["stage"] for row in manifest["parity"] if row["passed"]} == {"folding"}
        with pytest.raises(fa.InputError, match="was rejected when it was made"):
            verify_bundle(rejected)
        (rejected / "report.html").write_text("of the first")
        with pytest.raises(GateError):
            export_run(run, tmp_path / "b", overwrite=True)
        assert (rejected / "report.html").read_text() != "of the first"
        (rejected / "old").touch()  # nobody's to delete
        with pytest.raises(fa.InputError, match=r"b\.rejected holds old, which no export wrote"):
            export_run(run, tmp_path / "b", overwrite=True)
        assert (rejected / "old").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b.rejected", "run"]

    def test_a_file_that_fails_to_run_is_rejected(self, run, tmp_path, monkeypatch, quick, made):
        def fails(session, inputs, batch, output):
            raise fa.InputError(f"ONNX Runtime fails at batch size {batch}: bad shape")

        monkeypatch.setattr("fastadapt.export.bundle.gate.run_onnx", fails)
        with pytest.raises(GateError, match="fails at batch size 1: bad shape"):
            export_run(run, tmp_path / "b")
        assert not (tmp_path / "b").exists()

    def test_a_file_that_does_not_load_is_rejected(self, run, tmp_path, monkeypatch):
        def junk(folded, path, **kwargs):
            path.write_bytes(b"junk")
            return DESCRIBED

        monkeypatch.setattr("fastadapt.export.bundle.material.export_onnx", junk)
        with pytest.raises(GateError, match="ONNX Runtime cannot load"):
            export_run(run, tmp_path / "b")
        assert (tmp_path / "b.rejected" / "model.onnx").is_file()

    def test_outputs_that_do_not_vary_are_refused(self, run, tmp_path, quick):
        image = tmp_path / "same"
        image.mkdir()
        for index in range(6):
            Image.new("RGB", (40, 40), (9, 9, 9)).save(image / f"{index}.png")
        with pytest.raises(GateError, match="agreement says nothing"):
            export_run(run, tmp_path / "b", images=image)

    def test_a_wrong_fold_is_refused(self, run, tmp_path, monkeypatch):
        monkeypatch.setitem(
            fold.RULES, fa.LoRALinear, lambda x: fold.Folding(x.base, "unmerged", 0.0)
        )
        with pytest.raises(fa.InputError, match=r"backbone\.blocks\.0\.attn\.qkv"):
            export_run(run, tmp_path / "b")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
