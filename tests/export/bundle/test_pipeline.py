import hashlib
import html.parser
import json
import re
import shutil
import xml.etree.ElementTree

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_run, verify_bundle, write_repository
from fastadapt.export.bundle.golden import GoldenSamples
from fastadapt.export.bundle.measured import machine
from fastadapt.export.bundle.report import render_report
from fastadapt.export.bundle.samples import Sample, choose
from fastadapt.files import content_sha256, read_json
from tests.helpers.shallow_models import SHALLOW_VIT

pytestmark = pytest.mark.usefixtures("no_speed")


class TestBundle:
    def test_holds_what_deployment_needs(self, made):
        names = {path.name for path in (made / "bundle").iterdir()}
        assert names == {
            "model.onnx",
            "labels.txt",
            "golden",
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
        assert manifest["schema"] == 3
        assert manifest["content_sha256"] == content_sha256(manifest)
        labels = ["crack", "good"]
        assert manifest["tasks"] == [
            {"output": "logits", "kind": "classification", "labels": labels}
        ]
        assert manifest["backbone"]["name"] == SHALLOW_VIT
        assert manifest["backbone"]["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
        assert manifest["golden"]["origin"] == f"the validation split of {made / 'run'}"
        assert manifest["environment"]["devices"][0].startswith("cpu")
        (onnx_file,) = manifest["artefacts"]
        assert (onnx_file["path"], onnx_file["status"]) == ("model.onnx", "verified")
        assert onnx_file["speed"]["ONNX Runtime, CPU"]
        (row, *_) = manifest["measured"]
        assert (row["machine"], row["file"]) == (machine(on_gpu=False), "model.onnx")
        assert row["machine"] in (made / "bundle" / "report.html").read_text()
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
        assert len(manifest["fold_report"]["layers"]) == 3
        assert "torch" in manifest["environment"]["versions"]

    def test_model_says_where_it_is_from(self, made):
        model = onnx.load(made / "bundle" / "model.onnx")
        found = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(found["labels"]) == ["crack", "good"]
        assert json.loads(found["preprocessing"])["input_size"] == [3, 32, 32]
        assert found["backbone"] == SHALLOW_VIT
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
        assert set(metadata) == {"labels"}  # no names of files
        pre = Preprocess.from_dict(read_json(made / "run" / "config.json")["preprocess"])
        files = sorted((made / "images" / labels[0]).iterdir())
        (real,) = [p for p in files if np.array_equal(images[0], pre.read(p).numpy())]
        with Image.open(made / "bundle" / "golden" / "00.png") as image:
            assert not image.getexif() and not image.text
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(real)))
        again = pre.read(real)
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
        report = render_report(manifest, GoldenSamples((), (), {}, np.zeros((0, 2)), ""))
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
        with pytest.raises(fa.InputError, match=r"records no images.*`images="):
            export_run(tmp_path / "plain", tmp_path / "b", backbone=backbone)
        result = export_run(
            tmp_path / "plain", tmp_path / "b", images=made / "images", backbone=backbone
        )
        assert result.manifest["labels"] == ["0", "1", "2"]
        assert result.manifest["preprocessing"]["input_size"] == [3, 16, 16]
        assert verify_bundle(tmp_path / "b", speed=False).passed

    def test_images_override_the_split(self, made, run, tmp_path, quick):
        (run / "splits.csv").write_text("path,label,split\n/gone/1.png,crack,val\n")
        with pytest.raises(fa.InputError, match=r"1 of the 1 validation .*/gone/1\.png.*`images="):
            export_run(run, tmp_path / "b")
        assert export_run(run, tmp_path / "b", images=made / "images").bundle.is_dir()

    def test_choice_is_balanced_and_repeatable(self, tmp_path):
        samples = [Sample(tmp_path / f"{i}.png", "a" if i < 90 else "b") for i in range(100)]
        chosen = choose(samples, 16)
        assert [sample.label for sample in chosen].count("b") == 8
        assert chosen == choose(samples[::-1], 16)
