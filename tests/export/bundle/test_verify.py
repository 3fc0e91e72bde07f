import hashlib
import json
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import fastadapt as fa
from fastadapt import cli
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_onnx, verify_bundle
from fastadapt.export.artefact import Artefact
from fastadapt.export.bundle import verify as verify_step
from fastadapt.export.bundle.manifest import check_files, read_manifest
from fastadapt.export.graph_input import GraphInput
from fastadapt.info import versions

RNG = np.random.default_rng(0)
INPUT = GraphInput(Preprocess((3, 4, 4)))
ONNX = Artefact("onnx", "model.onnx", "fp32", "verified", files=("model.onnx",))


def make_bundle(folder):
    """A bundle of one linear layer, small enough to be made anew for every test."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).requires_grad_(False)
    export_onnx(
        model,
        folder / "model.onnx",
        input_size=(3, 4, 4),
        graph_input=INPUT,
        labels=["a", "b", "c"],
    )
    images = RNG.integers(0, 256, (8, 3, 4, 4), dtype=np.uint8)
    expected = model(INPUT.preprocess.normalize(torch.from_numpy(images))).numpy()
    save_file({"images": images, "expected": expected}, folder / "golden.safetensors")
    write_manifest(folder)
    return folder


def write_manifest(folder, **changes):
    files = {}
    for file in folder.iterdir():
        if file.name != "manifest.json":
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            files[file.name] = {"bytes": len(content), "sha256": digest}
    manifest = {
        "format": "fastadapt-bundle",
        "schema": 2,
        "accepted": True,
        "problems": [],
        "labels": ["a", "b", "c"],
        "files": files,
        "model": {"inputs": [{"name": "images", "dtype": "uint8", "shape": ["batch", 4, 4, 3]}]},
        "preprocessing": INPUT.to_dict(),
        "artefacts": [ONNX.to_dict()],
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


class TestVerify:
    @pytest.fixture
    def bundle(self, pristine, tmp_path):
        for file in pristine.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    def test_passes(self, pristine):
        result = verify_bundle(pristine, speed=False)
        assert result.passed
        assert [parity.batch for parity in result.parities] == [1, 5, 8, 32]
        assert result.images_per_second == {}

    def test_measures_speed(self, pristine):
        speed = verify_bundle(pristine).images_per_second
        assert set(speed) == {1, 8, 32}

    def test_a_model_that_computes_something_else_fails(self, bundle):
        model = onnx.load(bundle / "model.onnx")
        bias = next(t for t in model.graph.initializer if list(t.dims) == [3])
        bias.CopyFrom(onnx.numpy_helper.from_array(np.ones(3, np.float32), bias.name))
        onnx.save(model, bundle / "model.onnx")
        write_manifest(bundle)
        result = verify_bundle(bundle)
        assert not result.passed
        assert result.images_per_second == {}

    @pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors"])
    def test_damaged_files_are_named(self, bundle, name):
        file = bundle / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(fa.InputError, match=rf"{name} was changed: its SHA-256"):
            verify_bundle(bundle)
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(fa.InputError, match=rf"{name} has \d+ bytes, .*truncated"):
            verify_bundle(bundle)
        file.unlink()
        with pytest.raises(fa.InputError, match=rf"{name} is missing"):
            verify_bundle(bundle)

    @pytest.mark.parametrize(
        "changes,says",
        [
            ({"schema": 6}, "newer fastadapt .schema 6.*update"),
            ({"schema": "x"}, "newer fastadapt"),
            ({"format": "other"}, "no manifest of a fastadapt bundle"),
            ({"accepted": False, "problems": ["folding differs"]}, "rejected.*folding differs"),
            ({"files": {}}, r"lists no model\.onnx"),
            ({"files": []}, r"manifest\.json: 'files' is a list: .*dictionary"),
            ({"files": {"model.onnx": 3}}, "'files.model.onnx' is 3"),
            (
                {"files": {"../secret": {"bytes": 1, "sha256": 64 * "0"}}},
                "'../secret', outside the bundle",
            ),
            ({"model": {}}, "lacks the key 'model.inputs'"),
            ({"labels": None}, "'labels' is None: .*list"),
            ({"artefacts": [{"path": "model.onnx"}]}, r"lacks the key 'artefacts\.0\.kind'"),
        ],
    )
    def test_manifests_that_cannot_be_used(self, bundle, changes, says):
        write_manifest(bundle, **changes)
        with pytest.raises(fa.InputError, match=says):
            verify_bundle(bundle)

    def test_what_is_no_bundle(self, tmp_path):
        with pytest.raises(fa.InputError, match=r"has no manifest\.json"):
            verify_bundle(tmp_path)
        with pytest.raises(fa.InputError, match="is not there"):
            verify_bundle(tmp_path / "nothing")
        (tmp_path / "manifest.json").write_text("{")
        with pytest.raises(fa.InputError, match="no valid JSON"):
            verify_bundle(tmp_path)
        (tmp_path / "manifest.json").write_text('{"format": "fastadapt-bundle", "schema": 1}')
        with pytest.raises(fa.InputError, match="lacks the key 'files'"):
            verify_bundle(tmp_path)

    def test_damaged_golden_samples(self, bundle):
        images = np.zeros((8, 3, 4, 4), np.uint8)
        save_file({"images": images}, bundle / "golden.safetensors")
        write_manifest(bundle)
        with pytest.raises(fa.InputError, match=r"golden\.safetensors lacks .*'expected'"):
            verify_bundle(bundle)
        (bundle / "golden.safetensors").write_bytes(b"no tensors")
        write_manifest(bundle)
        with pytest.raises(fa.InputError, match=r"golden\.safetensors is no complete"):
            verify_bundle(bundle)

    def test_a_bundle_of_schema_1(self, bundle):
        """What the first version wrote: float input, one file that runs, no list of them."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).requires_grad_(False)
        old = GraphInput(Preprocess((3, 4, 4)), "float")
        export_onnx(model, bundle / "model.onnx", input_size=(3, 4, 4), graph_input=old)
        images = RNG.integers(0, 256, (8, 3, 4, 4), dtype=np.uint8)
        expected = model(old.preprocess.normalize(torch.from_numpy(images))).numpy()
        save_file({"images": images, "expected": expected}, bundle / "golden.safetensors")
        write_manifest(
            bundle,
            schema=1,
            preprocessing={**old.preprocess.to_dict(), "normalization_in_graph": True},
            versions={"onnxruntime-gpu": "1.0"},
            model={"file": "model.onnx", "opset": 20, "inputs": [{"name": "images"}]},
        )
        manifest = json.loads((bundle / "manifest.json").read_text())
        del manifest["artefacts"]
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        result = verify_bundle(bundle, speed=False)
        assert result.passed
        if "onnxruntime-gpu" in versions():
            assert result.notes[0].startswith("onnxruntime-gpu 1.0 made it")

    def test_as_json(self, bundle, monkeypatch, capfd):
        monkeypatch.setattr(sys, "argv", ["fastadapt", "verify", str(bundle), "--json"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
        result = json.loads(capfd.readouterr().out)
        assert result["passed"] and result["files"] == 2
        (artefact,) = result["artefacts"]
        assert artefact["status"] == "verified"
        assert "8" in artefact["speed"]["ONNX Runtime, CPU"]
        assert "torch" in result["environment"]["versions"]

    def test_a_failure_as_json(self, bundle, monkeypatch, capfd):
        (bundle / "model.onnx").write_bytes(b"not a model")
        write_manifest(bundle)
        monkeypatch.setattr(sys, "argv", ["fastadapt", "verify", str(bundle), "--json"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 1
        shown = capfd.readouterr()
        assert not json.loads(shown.out)["passed"]
        assert "cannot load model.onnx" in shown.err and shown.err.count("\n") == 1

    @pytest.fixture
    def with_engine(self, bundle):
        """An engine for a GPU that is not here."""
        (bundle / "m.engine").write_bytes(b"old")
        made = {"kind": "tensorrt_rtx", "library": "tensorrt_rtx", "version": "1.7"}
        (bundle / "m.engine.json").write_text(json.dumps({**made, "targets": ["sm_89"]}))
        engine = Artefact("tensorrt_rtx", "m.engine", "fp32", "unverified", files=("m.engine",))
        write_manifest(bundle, artefacts=[ONNX.to_dict(), engine.to_dict()])
        return bundle, engine

    def test_what_cannot_run_here_says_why(self, with_engine):
        bundle, _ = with_engine
        result = verify_bundle(bundle, trust=True)
        assert result.passed
        engine = result.artefacts[1]
        assert engine.status == "unverified" and "GPU" in engine.reason

    def test_rebuilding_puts_the_new_engine_into_the_manifest(self, with_engine, monkeypatch):
        bundle, _ = with_engine

        def rebuild(folder, artefact, reference, console):
            (folder / "m.engine").write_bytes(b"fresh")
            return replace(artefact, status="verified", details={"version": "2"})

        def verify(folder, known, *args, **options):
            if known.path == "model.onnx":
                return known
            return replace(known, status="unverified", reason="for another GPU")

        with pytest.raises(fa.InputError, match=r"`rebuild` needs the GPU that m\.engine"):
            monkeypatch.setattr(verify_step, "verify_artefact", verify)
            verify_bundle(bundle, rebuild=True)
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr(verify_step, "rebuild_artefact", rebuild)
        assert [a.status for a in verify_bundle(bundle).artefacts] == ["verified", "unverified"]
        assert (bundle / "m.engine").read_bytes() == b"old"
        result = verify_bundle(bundle, rebuild=True)
        assert [a.status for a in result.artefacts] == ["verified", "verified"]
        manifest = read_manifest(bundle)
        check_files(bundle, manifest)
        assert manifest["artefacts"][1]["details"] == {"version": "2"}

    def test_a_file_that_is_no_onnx(self, bundle):
        (bundle / "model.onnx").write_bytes(b"not a model")
        write_manifest(bundle)
        result = verify_bundle(bundle)
        assert not result.passed
        assert result.problems[0].startswith("model.onnx: ONNX Runtime cannot load model.onnx")
        assert "\n" not in result.problems[0]

    def test_a_model_with_a_fixed_batch_fails_at_the_others(self, bundle):
        model = onnx.load(bundle / "model.onnx")
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        onnx.save(model, bundle / "model.onnx")
        stated = json.loads((bundle / "manifest.json").read_text())["model"]
        stated["inputs"][0]["shape"][0] = 2
        write_manifest(bundle, model=stated)
        failed = [p.batch for p in verify_bundle(bundle).parities if not p.passed]
        assert failed == [1, 5, 8, 32]
