import csv
import errno
import hashlib
import html.parser
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import fastadapt as fa
from fastadapt import cli
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_run, verify_bundle, write_repository
from fastadapt.export.bundle import check as material_step
from fastadapt.export.bundle import pipeline as bundle_step
from fastadapt.export.bundle.parity import GateError
from fastadapt.export.bundle.report import render_report
from fastadapt.export.bundle.samples import Sample, choose
from fastadapt.export.bundle.staging import staging
from fastadapt.files import read_json
from fastadapt.lora import LoRAConfig, lora_layers

DESCRIBED = {
    "opset": 20,
    "inputs": [{"name": "images", "dtype": "uint8", "shape": ["batch", 32, 32, 3]}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run as training leaves it, its images, and the bundle made of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("made")
    backbone = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(backbone.state_dict(), folder / "weights.pth")
    config = fa.AdaptConfig(rank=8, num_centers=3, lora=LoRAConfig(r=2), input_size=(3, 32, 32))
    model = fa.adapt("test_vit", config, 2, weights=str(folder / "weights.pth"))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["all"], std=0.3)
    preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg).to_dict()
    fa.save_adapter(model, folder / "run", labels=["crack", "good"], preprocess=preprocess)
    rows = write_images(folder / "images")
    with (folder / "run" / "splits.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    export_run(folder / "run", folder / "bundle")
    return folder


@pytest.fixture(autouse=True)
def _no_speed(monkeypatch):
    """Seconds per export that prove nothing here."""
    monkeypatch.setattr("fastadapt.export.bundle.build.measure", lambda *args: {"1": 1.0})


def write_images(folder):
    rng = np.random.default_rng(0)
    rows = []
    for index in range(24):
        label = ("crack", "good")[index % 2]
        path = folder / label / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 36)).save(path)
        rows.append((str(path), label, "train" if index < 4 else "val"))
    return rows


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made / "run", tmp_path / "run")


@pytest.fixture
def quick(made, monkeypatch):
    """The ONNX file that was exported before, instead of exporting it anew."""

    def copy(folded, path, **kwargs):
        shutil.copy(made / "bundle" / "model.onnx", path)
        return DESCRIBED

    monkeypatch.setattr(material_step, "export_onnx", copy)


@pytest.fixture
def broken(made, monkeypatch):
    """An exporter that gets one weight wrong."""

    def wrong(folded, path, **kwargs):
        model = onnx.load(made / "bundle" / "model.onnx")
        weight = next(t for t in model.graph.initializer if list(t.dims) == [2, 64])
        values = onnx.numpy_helper.to_array(weight).copy()
        values[0, 0] += 0.1
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(model, path)
        return DESCRIBED

    monkeypatch.setattr(material_step, "export_onnx", wrong)


def command(monkeypatch, *args):
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["fastadapt", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestBundle:
    def test_holds_what_deployment_needs(self, made):
        names = {path.name for path in (made / "bundle").iterdir()}
        assert names == {
            "model.onnx",
            "labels.txt",
            "golden.safetensors",
            "manifest.json",
            "report.html",
        }
        assert (made / "bundle" / "labels.txt").read_text() == "crack\ngood\n"
        assert not [path for path in made.iterdir() if path.name.startswith(".")]

    def test_manifest_explains_it(self, made):
        manifest = read_json(made / "bundle" / "manifest.json")
        assert manifest["accepted"]
        for name, file in manifest["files"].items():
            content = (made / "bundle" / name).read_bytes()
            assert file == {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        adapter = (made / "run" / "adapter.safetensors").read_bytes()
        assert manifest["schema"] == 2
        assert manifest["backbone"]["name"] == "test_vit"
        assert manifest["backbone"]["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
        assert manifest["golden"]["origin"] == f"the validation split of {made / 'run'}"
        assert manifest["environment"]["devices"][0].startswith("cpu")
        (onnx_file,) = manifest["artefacts"]
        assert (onnx_file["path"], onnx_file["status"]) == ("model.onnx", "verified")
        assert onnx_file["speed"]["ONNX Runtime, CPU"]
        assert manifest["source"]["adapter_sha256"] == hashlib.sha256(adapter).hexdigest()
        assert manifest["source"]["config"]["backbone"]["fingerprint"]
        assert manifest["preprocessing"]["normalization_in_graph"]
        assert manifest["model"]["outputs"][0]["shape"] == ["batch", 2]
        stages = [(row["stage"], row["batch"]) for row in manifest["parity"]]
        assert stages == [
            (stage, batch)
            for stage in ("folding", "ONNX Runtime", "end to end")
            for batch in (1, 2, 5)
        ]
        assert len(manifest["fold_report"]["layers"]) == 7
        assert "torch" in manifest["environment"]["versions"]

    def test_model_says_where_it_is_from(self, made):
        model = onnx.load(made / "bundle" / "model.onnx")
        found = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(found["labels"]) == ["crack", "good"]
        assert json.loads(found["preprocessing"])["input_size"] == [3, 32, 32]
        assert found["backbone"] == "test_vit"
        assert len(found["adapter_sha256"]) == 64

    def test_is_verified_elsewhere(self, made, tmp_path):
        moved = shutil.copytree(made / "bundle", tmp_path / "elsewhere")
        assert verify_bundle(moved, speed=False).passed

    def test_golden_samples_are_real_and_of_every_class(self, made):
        from safetensors import safe_open

        with safe_open(made / "bundle" / "golden.safetensors", framework="np") as file:
            images, expected = file.get_tensor("images"), file.get_tensor("expected")
            metadata = file.metadata()
        assert images.shape == (16, 3, 32, 32)
        assert images.dtype == np.uint8
        assert expected.shape == (16, 2)
        labels = json.loads(metadata["labels"])
        assert labels.count("crack") == labels.count("good") == 8
        name = json.loads(metadata["files"])[0]
        pre = Preprocess.from_dict(read_json(made / "run" / "config.json")["preprocess"])
        again = pre.read(made / "images" / labels[0] / name)
        assert np.array_equal(images[0], again.numpy())
        model = fa.load_adapter(made / "run")
        with torch.no_grad():
            want = model(pre.normalize(again[None]))
        torch.testing.assert_close(torch.from_numpy(expected[:1]), want, rtol=1e-4, atol=1e-5)

    def test_report_needs_nothing_else(self, made):
        report = (made / "bundle" / "report.html").read_text()
        for tag in ("<script", "<link", "<iframe", "@import", "url(http"):
            assert tag not in report
        assert not re.search(r'(src|href)="(?!data:|#)', report)
        parser = html.parser.HTMLParser()
        parser.feed(report)
        for word in ("Accepted", "end to end", "crack", "in the graph", "LoRALinear"):
            assert word in report
        assert report.count("<img") == 16
        (parity, speed) = re.findall(r"<svg.*?</svg>", report, re.S)
        for figure, text in ((parity, "ONNX Runtime"), (speed, "images per second")):
            assert text in figure
            xml.etree.ElementTree.fromstring(figure)

    def test_what_it_says_of_others_is_text(self, made):
        manifest = read_json(made / "bundle" / "manifest.json")
        manifest["backbone"]["name"] = "<script>alert(1)</script>"
        manifest["problems"], manifest["accepted"] = ["<b>bad</b> & worse"], False
        engine = manifest["artefacts"][0]
        details = {**engine["details"], "fp32_layers": ["<i>head</i>"], "version": "10.1"}
        manifest["artefacts"].append({**engine, "path": "m.engine", "details": details})
        report = render_report(manifest, [], np.zeros((0, 2)))
        assert "kept in fp32</td><td>&lt;i&gt;head&lt;/i&gt;" in report
        assert "<script" not in report and "<b>" not in report
        assert "Rejected" in report and "&lt;b&gt;bad&lt;/b&gt; &amp; worse" in report

    def test_weights_beyond_one_file(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr("fastadapt.export.backends.onnx.ONE_FILE_LIMIT", 1000)
        manifest = export_run(run, tmp_path / "b").manifest
        assert "model.onnx.data" in manifest["files"]
        assert manifest["artefacts"][0]["files"] == ["model.onnx", "model.onnx.data"]
        assert verify_bundle(tmp_path / "b").passed
        model = write_repository(tmp_path / "b", tmp_path / "models")
        names = {path.name for path in (model / "1").iterdir()}
        assert names == {"model.onnx", "model.onnx.data"}
        (tmp_path / "b" / "model.onnx.data").unlink()
        with pytest.raises(fa.InputError, match=r"model\.onnx\.data is missing"):
            verify_bundle(tmp_path / "b")

    def test_resizing_in_the_graph(self, run, tmp_path):
        result = export_run(run, tmp_path / "b", resize=True)
        assert result.manifest["model"]["inputs"][0]["shape"] == ["batch", "height", "width", 3]
        assert result.parities[0].stage == "resizing"
        assert result.parities[0].error < 0.05
        assert verify_bundle(tmp_path / "b", speed=False).passed

    def test_normalisation_outside_the_graph(self, run, made, tmp_path):
        result = export_run(run, tmp_path / "b", input="float", normalize=False)
        assert not result.manifest["preprocessing"]["normalization_in_graph"]
        assert verify_bundle(tmp_path / "b", speed=False).passed


class TestSources:
    def test_plain_adapter_takes_a_folder_of_images(self, made, tmp_path):
        model = fa.adapt(nn.Conv2d(3, 8, 4), fa.AdaptConfig(rank=4, input_size=(3, 16, 16)), 3)
        fa.save_adapter(model, tmp_path / "plain")
        backbone = model.backbone
        with pytest.raises(fa.InputError, match=r"records no images.*--images"):
            export_run(tmp_path / "plain", tmp_path / "b", backbone=backbone)
        result = export_run(
            tmp_path / "plain", tmp_path / "b", images=made / "images", backbone=backbone
        )
        assert result.manifest["labels"] == ["0", "1", "2"]
        assert result.manifest["preprocessing"]["input_size"] == [3, 16, 16]
        assert verify_bundle(tmp_path / "b", speed=False).passed

    def test_images_override_the_split(self, made, run, tmp_path, quick):
        (run / "splits.csv").write_text("path,label,split\n/gone/1.png,crack,val\n")
        with pytest.raises(fa.InputError, match=r"1 of the 1 validation .*/gone/1\.png.*--images"):
            export_run(run, tmp_path / "b")
        assert export_run(run, tmp_path / "b", images=made / "images").bundle.is_dir()

    def test_choice_is_balanced_and_repeatable(self, tmp_path):
        samples = [Sample(tmp_path / f"{i}.png", "a" if i < 90 else "b") for i in range(100)]
        chosen = choose(samples, 16)
        assert [sample.label for sample in chosen].count("b") == 8
        assert chosen == choose(samples[::-1], 16)


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
        (rejected / "old").touch()
        with pytest.raises(GateError):
            export_run(run, tmp_path / "b", overwrite=True)
        assert not (rejected / "old").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "b.rejected", "run"]

    def test_a_file_that_fails_to_run_is_rejected(self, run, tmp_path, monkeypatch, quick, made):
        def fails(session, inputs, batch):
            raise fa.InputError(f"ONNX Runtime fails at batch size {batch}: bad shape")

        monkeypatch.setattr("fastadapt.export.bundle.onnx_check.run_onnx", fails)
        with pytest.raises(GateError, match="fails at batch size 1: bad shape"):
            export_run(run, tmp_path / "b")
        assert not (tmp_path / "b").exists()

    def test_a_file_that_does_not_load_is_rejected(self, run, tmp_path, monkeypatch):
        def junk(folded, path, **kwargs):
            path.write_bytes(b"junk")
            return DESCRIBED

        monkeypatch.setattr(material_step, "export_onnx", junk)
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
        from fastadapt.export import fold

        monkeypatch.setitem(fold.RULES, fa.LoRALinear, lambda x: (x.base, "unmerged", 0.0))
        with pytest.raises(fa.InputError, match=r"backbone\.blocks\.0\.attn\.qkv"):
            export_run(run, tmp_path / "b")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


class TestTarget:
    def test_existing_bundle_needs_overwrite(self, run, made, tmp_path, monkeypatch, quick):
        shutil.copytree(made / "bundle", tmp_path / "b")
        monkeypatch.setattr(bundle_step, "load_run", None)
        with pytest.raises(fa.InputError, match="b exists: replace it with --overwrite"):
            export_run(run, tmp_path / "b")
        monkeypatch.undo()

    def test_overwrite_replaces_it(self, run, made, tmp_path, quick):
        shutil.copytree(made / "bundle", tmp_path / "b")
        (tmp_path / "b" / "labels.txt").write_text("old")
        export_run(run, tmp_path / "b", overwrite=True)
        assert (tmp_path / "b" / "labels.txt").read_text() == "crack\ngood\n"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "run"]

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_what_is_no_bundle_is_never_replaced(self, run, tmp_path, overwrite):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").touch()
        with pytest.raises(fa.InputError, match="mine exists and is no bundle"):
            export_run(run, tmp_path / "mine", overwrite=overwrite)
        with pytest.raises(fa.InputError, match="run exists and is no bundle"):
            export_run(run, run, overwrite=overwrite)

    @pytest.mark.parametrize(
        "step", ["export_onnx", "build_artefacts", "write_tensors", "render_report", "write_json"]
    )
    def test_full_disk_leaves_what_was_there(
        self, run, made, tmp_path, monkeypatch, quick, capsys, step
    ):
        shutil.copytree(made / "bundle", tmp_path / "b")
        kept = contents(tmp_path / "b")

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device", "b/golden.safetensors")

        room = material_step if hasattr(material_step, step) else bundle_step
        monkeypatch.setattr(room, step, full)
        assert command(monkeypatch, "export", run, "--out", tmp_path / "b", "--overwrite") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "no space left on the disk of" in error
        assert contents(tmp_path / "b") == kept
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "run"]

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
    def test_a_kill_in_the_middle_leaves_no_half_bundle(self, run, tmp_path, how, quick):
        code = (
            "import sys, time; from fastadapt.export import material\n"
            "def slow(folded, path, **kwargs): path.touch(); time.sleep(60)\n"
            "material.export_onnx = slow\n"
            "from fastadapt import cli; cli.main()"
        )
        args = [sys.executable, "-c", code, "export", str(run), "--out", str(tmp_path / "b")]
        process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob(".b.*/model.onnx")) and time.monotonic() < deadline:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
            # Another export of the same name leaves what is in use alone.
            with staging(tmp_path / "b"):
                assert list(tmp_path.glob(".b.*/model.onnx"))
            process.send_signal(how)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
        assert not (tmp_path / "b").exists()
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert "Traceback" not in error
            assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
        else:
            assert len(list(tmp_path.glob(".b.*.tmp"))) == 1
            export_run(run, tmp_path / "b")
            assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "run"]

    def test_a_kill_between_two_names_brings_the_bundle_back(self, made, tmp_path):
        old = shutil.copytree(made / "bundle", tmp_path / ".b.abcd1234.tmp.old")
        kept = contents(old)
        for name in (".b.2.abcd1234.tmp", ".c.abcd1234.tmp", ".b.mine.tmp"):  # others'
            (tmp_path / name).mkdir()
        with staging(tmp_path / "b"):
            assert contents(tmp_path / "b") == kept
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"b", ".b.2.abcd1234.tmp", ".c.abcd1234.tmp", ".b.mine.tmp"}
        shutil.copytree(made / "bundle", old)
        with staging(tmp_path / "b"):
            assert not old.exists()


def damage(run, what):
    config = read_json(run / "config.json")
    adapter = run / "adapter.safetensors"
    if what == "no config":
        (run / "config.json").unlink()
    elif what == "truncated":
        adapter.write_bytes(adapter.read_bytes()[:-100])
    elif what == "nan":
        from safetensors.torch import load_file, save_file

        state = load_file(adapter)
        state["head.weight"][0, 0] = float("nan")
        save_file(state, adapter)
    elif what == "other backbone":
        config["backbone"]["fingerprint"] = "0" * 64
    elif what == "unknown backbone":
        config["backbone"]["name"] = "test_vitt"
    elif what == "labels":
        config["labels"] = ["one"]
    elif what == "few images":
        (run / "splits.csv").write_text("path,label,split\n/a.png,crack,train\n")
    if what != "no config":
        (run / "config.json").write_text(json.dumps(config))


class TestCommand:
    def test_export_and_verify(self, run, tmp_path, monkeypatch, capfd, quick):
        assert command(monkeypatch, "export", run, "--onnx", "--out", tmp_path / "b") == 0
        shown = capfd.readouterr()
        assert shown.err == ""
        for word in ("✓ fold", "6 LoRALinear, 1 ClusterAttention", "end to end", "model.onnx"):
            assert word in shown.out
        assert command(monkeypatch, "verify", tmp_path / "b") == 0
        shown = capfd.readouterr()
        assert shown.err == ""
        assert "images/s" in shown.out

    def test_the_bundle_lies_in_the_run_by_default(self, run, monkeypatch, quick):
        assert command(monkeypatch, "export", run) == 0
        assert (run / "bundle" / "model.onnx").is_file()

    def test_rejection_is_exit_code_one(self, run, tmp_path, monkeypatch, capfd, broken):
        assert command(monkeypatch, "export", run, "--out", tmp_path / "b") == 1
        shown = capfd.readouterr()
        assert shown.err.startswith("fastadapt: the export was rejected: ONNX Runtime at batch 1")
        assert shown.err.count("\n") == 1
        assert "✗" in shown.out

    def test_verify_says_what_is_wrong(self, made, tmp_path, monkeypatch, capfd):
        shutil.copytree(made / "bundle", tmp_path / "b")
        (tmp_path / "b" / "labels.txt").write_text("good\ncrack\n")
        assert command(monkeypatch, "verify", tmp_path / "b") == 1
        assert "labels.txt was changed" in capfd.readouterr().err

    @pytest.mark.parametrize(
        "what,says",
        [
            ("no config", "config.json does not exist"),
            ("truncated", "adapter.safetensors is no complete safetensors file"),
            ("nan", "head.weight holds 1 values that are NaN"),
            ("other backbone", "was trained on other weights of test_vit"),
            ("unknown backbone", "timm has no model 'test_vitt'. Nearest: test_vit"),
            ("labels", "names 1 labels; the model has 2 classes"),
            ("few images", "has 0 images; the gate needs at least 5"),
        ],
    )
    def test_bad_runs_are_one_clear_line(self, run, tmp_path, monkeypatch, capfd, what, says):
        damage(run, what)
        assert command(monkeypatch, "export", run, "--out", tmp_path / "b") == 1
        error = capfd.readouterr().err
        assert says in error
        assert error.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    def test_missing_things(self, run, tmp_path, monkeypatch, capfd):
        assert command(monkeypatch, "export", tmp_path / "nothing") == 1
        assert "nothing is no folder" in capfd.readouterr().err
        assert command(monkeypatch, "export", run, "--images", tmp_path / "nothing") == 1
        assert "nothing is no folder" in capfd.readouterr().err
        assert command(monkeypatch, "export", run, "--weights", tmp_path / "gone.pth") == 1
        assert "gone.pth, which are not there" in capfd.readouterr().err
