import platform
import shutil
import sys

import numpy as np
import pytest
import torch

import fastadapt as fa
from fastadapt.export import EngineOptions, verify_bundle
from fastadapt.export.artefact import UNVERIFIED, VERIFIED
from fastadapt.export.backends import coreml
from fastadapt.export.bundle import material
from fastadapt.export.bundle.measured import read_rows
from fastadapt.export.runtimes import RuntimeUnavailable, load_runtime
from fastadapt.export.settings import Batches
from fastadapt.files import read_json, seal, write_json
from tests.helpers.command import command
from tests.helpers.core_ml import core_ml

NAME = "model.fp16.mlpackage"
FILES = (
    f"{NAME}/Data/com.apple.CoreML/model.mlmodel",
    f"{NAME}/Data/com.apple.CoreML/weights/weight.bin",
    f"{NAME}/Manifest.json",
)


@pytest.fixture
def stand_in(monkeypatch):
    """Put a stand-in for coremltools in its place; its version is that of another package."""
    monkeypatch.setitem(sys.modules, "coremltools", core_ml())
    version = coreml.importlib.metadata.version
    monkeypatch.setattr(
        coreml.importlib.metadata,
        "version",
        lambda name: "9.0" if name == "coremltools" else version(name),
    )


class TestTheFile:
    def test_its_interface_and_precisions(self, folded_model, tmp_path, capfd):
        tools = pytest.importorskip("coremltools")
        example = tuple(torch.from_numpy(x[:1]) for x in folded_model.reference.inputs.values())
        model = folded_model.deployed(folded_model.module)
        names = {"inputs": ["images"], "outputs": ["logits"], "metadata": {"labels": '["a", "b"]'}}
        capfd.readouterr()
        kinds = {}
        for precision in ("fp32", "fp16"):
            path = tmp_path / f"model.{precision}.mlpackage"
            details = coreml.convert(model, example, path, Batches(), **names, precision=precision)
            assert details["outputs"] == {"logits": folded_model.reference.expected.shape[1]}
            height, width = example[0].shape[1:3]
            assert details["input"] == {
                "name": "images",
                "kind": "RGB image",
                "size": [height, width],
            }
            assert [f"model.{precision}.mlpackage/Manifest.json"] == [
                name for name in coreml.package_files(path) if name.endswith(".json")
            ]
            spec = tools.utils.load_spec(str(path))
            assert spec.description.metadata.userDefined["labels"] == '["a", "b"]'
            (block,) = spec.mlProgram.functions["main"].block_specializations.values()
            operations = [o for o in block.operations if o.type not in ("const", "cast")]
            values = [o.outputs[0].type.tensorType for o in operations]
            kinds[precision] = {(value.rank > 2, value.dataType) for value in values}
        assert not capfd.readouterr().err
        half, single = 10, 11  # of the specification
        assert kinds["fp32"] == {(True, single), (False, single)}
        assert (True, half) in kinds["fp16"] and (False, half) not in kinds["fp16"]
        assert {path.name for path in tmp_path.iterdir()} == {
            f"model.{precision}.mlpackage" for precision in kinds
        }
        shape = (1, 3, height, width)
        with pytest.raises(fa.InputError, match=r"fp16\.mlpackage gives .*; expected "):
            coreml.check_interface(path, {"images": shape}, {"logits": 9})
        with pytest.raises(fa.InputError, match=r"fp16\.mlpackage takes .*; expected "):
            coreml.check_interface(path, {"pixels": shape}, details["outputs"])

    def test_what_it_cannot_convert(self, tmp_path):
        pytest.importorskip("coremltools")

        class Odd(torch.nn.Module):
            def forward(self, x):
                return torch.linalg.eigvals(x[:, 0].float()).abs()

        names = {"inputs": ["images"], "outputs": ["logits"], "metadata": {}}
        with pytest.raises(fa.InputError, match="Core ML cannot convert the model: ") as caught:
            coreml.convert(
                Odd(), (torch.rand(1, 3, 4, 4),), tmp_path / "m.mlpackage", Batches(), **names
            )
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


class TestTheBundle:
    def test_it_waits_for_a_mac(self, made, tmp_path, stand_in, monkeypatch):
        bundle = tmp_path / "b"
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        known = read_json(made / "bundle" / "manifest.json")["model"]

        def copied(module, path, **options):  # the graphs are tested elsewhere
            shutil.copy(made / "bundle" / "model.onnx", path)
            return {key: value for key, value in known.items() if key != "file"}

        monkeypatch.setattr(material, "export_onnx", copied)
        options = ("--coreml", "--precision", "fp16", "--batch", "1:1:2", "--no-speed")
        assert command(monkeypatch, "export", made / "run", "--out", bundle, *options) == 0
        manifest = read_json(bundle / "manifest.json")
        assert manifest["schema"] == 5  # older versions say that they are older
        assert set(FILES) <= set(manifest["files"])
        entry = manifest["artefacts"][-1]
        assert (entry["kind"], entry["path"], tuple(entry["files"])) == ("coreml", NAME, FILES)
        assert entry["status"] == UNVERIFIED and "which runs on macOS only" in entry["reason"]
        # No layer needs fp32, so that coremltools may cast.
        assert read_json(bundle / FILES[2])["precision"] == entry["precision"] == "fp16"
        metadata = read_json(bundle / FILES[0])
        assert metadata["labels"] == '["crack", "good"]' and "preprocessing" in metadata

        result = verify_bundle(bundle, speed=False)
        assert result.passed and result.artefacts[-1].status == UNVERIFIED
        predict = fa.export.load(bundle)
        assert predict.artefact.path == "model.onnx"
        with pytest.raises(RuntimeUnavailable, match="which runs on macOS only"):
            fa.export.load(bundle, NAME)

        # A Mac, with a runtime that computes what the file holds.
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        found = verify_bundle(bundle, measure=True).artefacts[-1]
        assert found.status == VERIFIED, found.reason
        assert list(found.speed) == ["Core ML"]
        rows = [row for row in read_rows(bundle, manifest) if row["file"] == NAME]
        assert {row["runtime"] for row in rows} == {"Core ML"}
        image = sorted((made / "images").rglob("*.png"))[0]
        logits = fa.export.load(bundle, NAME, device="cpu")([image]).logits
        np.testing.assert_allclose(logits, predict([image]).logits, rtol=1e-3, atol=1e-4)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
        assert "program of its runtime" in verify_bundle(bundle, speed=False).artefacts[-1].reason

        check_damage(bundle, manifest, tmp_path)

    def test_floats(self, tmp_path, stand_in, monkeypatch):
        """A bundle whose files take fp32 in [0, 1] has an image as Core ML's input, too."""
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).eval()
        pixels = torch.randint(0, 256, (3, 3, 6, 8)) / 255
        names = {"inputs": ["images"], "outputs": ["logits"], "metadata": {}}
        coreml.convert(model, (pixels[:1],), tmp_path / "m.mlpackage", Batches(), **names)
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        outputs = load_runtime(tmp_path / "m.mlpackage")(pixels)
        torch.testing.assert_close(outputs, model(pixels).detach(), rtol=1e-5, atol=1e-6)
        (tmp_path / "m.mlpackage" / "Manifest.json").unlink()
        with pytest.raises(fa.InputError, match=r"Core ML cannot load m\.mlpackage: A valid"):
            load_runtime(tmp_path / "m.mlpackage")


def check_damage(bundle, manifest, folder):
    """Name what was changed in a package, and refuse entries that say too little of it."""
    changed = shutil.copytree(bundle, folder / "changed")
    for change, message in (
        ({"files": []}, "is a folder, and no file in it is named"),
        ({"files": ["golden/0.png"]}, "'golden/0.png' does not match the pattern of a name in"),
        ({"files": [f"{NAME}/other"]}, f"lists no {NAME}/other"),
    ):
        rows = [*manifest["artefacts"][:-1], {**manifest["artefacts"][-1], **change}]
        write_json(changed / "manifest.json", seal({**manifest, "artefacts": rows}))
        with pytest.raises(fa.InputError, match=message):
            verify_bundle(changed)
    write_json(changed / "manifest.json", seal({**manifest, "schema": 4, "tasks": []}))
    with pytest.raises(fa.InputError, match="is a folder, which schema 5 brought"):
        verify_bundle(changed)
    write_json(changed / "manifest.json", manifest)
    (changed / FILES[1]).write_bytes((changed / FILES[1]).read_bytes()[:-1])
    with pytest.raises(fa.InputError, match=r"weight\.bin has .* was truncated or changed"):
        fa.export.load(changed)


def test_what_is_refused_before_any_work(tmp_path, monkeypatch):
    path = tmp_path / "m.mlpackage"
    with pytest.raises(fa.InputError, match=r"m\.mlpackage does not exist"):
        load_runtime(path)
    path.mkdir()
    with pytest.raises(RuntimeUnavailable, match="is for Core ML, which knows no CUDA"):
        load_runtime(path, device="cuda")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setitem(sys.modules, "coremltools", None)
    remedy = r"coremltools is not installed: pip install 'fastadapt\[coreml\]'"
    with pytest.raises(RuntimeUnavailable, match=remedy):
        load_runtime(path)
    with pytest.raises(fa.InputError, match=remedy):
        EngineOptions(coreml=True).check()
    with pytest.raises(fa.InputError, match="`int8` is not made for Core ML"):
        EngineOptions(coreml=True, int8=True).check()
    settings = {"engines": EngineOptions(coreml=True), "input": "float", "normalize": False}
    with pytest.raises(fa.InputError, match="`coreml` takes the image's own bytes"):
        fa.export.export_run(tmp_path, tmp_path / "b", **settings)


def test_aliases_are_taken_out():
    """coremltools lacks them; the exported Swin has some."""

    class Aliased(torch.nn.Module):
        def forward(self, x):
            return torch.ops.aten.alias(torch.ops.aten.alias(x) + 1)

    program = torch.export.export(Aliased(), (torch.zeros(2),)).run_decompositions({})
    count = [node.target for node in program.graph.nodes].count(torch.ops.aten.alias.default)
    coreml._drop_aliases(program.graph_module)
    left = [node.target for node in program.graph.nodes].count(torch.ops.aten.alias.default)
    assert (count, left) == (2, 1)  # an output keeps its name
    assert torch.equal(program.module()(torch.zeros(2)), torch.ones(2))
