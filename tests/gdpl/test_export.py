import json
import shutil
import sys
from dataclasses import replace

import onnx
import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt import cli
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_run, fold_with_report, load, verify_bundle
from fastadapt.export.bundle.gate import onnx_session
from fastadapt.export.bundle.golden import golden_inputs
from fastadapt.files import read_tensors, write_tensors
from fastadapt.gdpl import (
    DomainEncoder,
    GDPLConfig,
    GDPLTrainConfig,
    load_gdpl,
    save_gdpl,
    train_gdpl,
)
from fastadapt.gdpl.fold import FoldedPromptLearner
from tests.gdpl.test_model import SMALL, WIDTH, randomize, small_model
from tests.helpers.bundles import reseal
from tests.helpers.gdpl_models import clip_model, make_colours, save_source

NAMES = ("annual_crop", "forest", "harbour", "industrial_area", "river")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run; its learning rate is so high that every part has an effect."""
    folder = tmp_path_factory.mktemp("gdpl")
    source = save_source(folder / "clip")
    data = make_colours(folder / "data", NAMES)
    config = GDPLTrainConfig(shots=2, epochs=1, lr=0.05, optimizer="adamw", val_fraction=0.4)
    train_gdpl(data, folder / "run", source, config, GDPLConfig(depth=2, rank_depth=1))
    return folder / "run"


class TestFold:
    @pytest.mark.parametrize(
        ("config", "clip"),
        [({}, {}), ({"depth": 1}, {"custom_text": True}), ({"rank": 0, "class_chunk": 2}, {})],
    )
    def test_outputs_are_the_same(self, config, clip):
        model = small_model(GDPLConfig(**{**vars(SMALL), **config}), clip=clip_model(**clip))
        model = randomize(model).double().eval()
        x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        f = torch.randn(3, WIDTH, dtype=torch.float64)
        want = model(x, f)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        folded, report = fold_with_report(model)
        torch.testing.assert_close(folded(x, f), want, rtol=1e-11, atol=1e-11)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        merged = [row for row in report.layers if row.kind == "CoupledLinear"]
        assert len(merged) == (0 if config.get("rank") == 0 else 2 * 2 * 2)
        assert all(row.weight_change > 1e-2 for row in merged)

    def test_half_precision(self):
        model = randomize(small_model()).bfloat16().eval()
        x, f = torch.randn(2, 3, 16, 16).bfloat16(), torch.randn(2, WIDTH).bfloat16()
        folded, report = fold_with_report(model)
        assert report.max_error < 2e-2
        torch.testing.assert_close(folded(x, f), model(x, f), rtol=0.1, atol=0.5)

    def test_what_is_left_is_ordinary(self):
        folded = fa.fold(randomize(small_model()))
        assert folded.low_rank is None
        assert isinstance(folded.prompt_learner, FoldedPromptLearner)
        kinds = {type(m).__name__ for m in folded.modules()}
        assert not kinds & {"QuaternionLinear", "CoupledLowRank", "DomainPromptLearner"}
        assert not any(p.requires_grad for p in folded.parameters())

    def test_other_classes_after_folding(self):
        model = randomize(small_model()).eval()
        folded = fa.fold(model)
        x, f = torch.randn(2, 3, 16, 16), torch.randn(2, WIDTH)
        want = model.set_class_names(["harbour", "sea"])(x, f)
        got = folded.set_class_names(["harbour", "sea"])(x, f)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    def test_errors_are_measured_on_an_example(self):
        encoder = DomainEncoder(nn.Conv2d(3, WIDTH, 8, 8), input_size=(3, 16, 16))
        model = randomize(small_model(encoder=encoder))
        _, report = fold_with_report(model, torch.randn(2, 3, 16, 16))
        (row,) = [row for row in report.layers if row.kind == "DomainPromptLearner"]
        assert row.probe == "example" and row.folded.startswith("2 Linear 7→5→")
        assert report.max_error < 1e-5

    def test_random_predictions_are_refused(self):
        model = small_model(GDPLConfig(**{**vars(SMALL), "noise": "always"}))
        with pytest.raises(fa.InputError, match="noise='always'"):
            fa.fold(model)

    @pytest.mark.parametrize("rotate", [False, True])
    @pytest.mark.parametrize("groups", [None, 3])
    def test_zero_half_and_grouped_quaternion_layers(self, rotate, groups):
        layer = fa.QuaternionLinear(16, 8, rotation=rotate, zero_half=True, groups=groups)
        x = torch.randn(*(() if groups is None else (groups,)), 5, 8)
        folded = fa.fold(layer)
        torch.testing.assert_close(folded(x), layer(x))
        assert isinstance(folded, nn.Linear) == (groups is None)


class TestExport:
    def test_bundle_through_the_gate(self, run, tmp_path):
        result = export_run(run, tmp_path / "bundle")
        assert result.manifest["accepted"]
        assert result.manifest["labels"] == ["annual_crop", "forest", "harbour"]
        assert {p.stage for p in result.parities} == {"folding", "ONNX Runtime", "end to end"}
        assert verify_bundle(tmp_path / "bundle", speed=False).passed

    def test_other_classes_need_no_training(self, run, tmp_path, monkeypatch, capsys):
        names = tmp_path / "names.txt"
        names.write_text("river\nindustrial area\nannual crop\nsea or lake\n")
        bundle = tmp_path / "bundle"
        options = ["export", run, "--out", bundle, "--classes", names]
        monkeypatch.setattr(sys, "argv", ["fastadapt", *map(str, options)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, capsys.readouterr().err
        manifest = json.loads((bundle / "manifest.json").read_text())
        assert manifest["labels"] == ["river", "industrial area", "annual crop", "sea or lake"]
        assert manifest["model"]["outputs"][0]["shape"] == ["batch", 4]
        assert verify_bundle(bundle, speed=False).passed

    def test_names_that_do_not_fit_are_refused(self, run, tmp_path):
        with pytest.raises(fa.InputError, match="same text"):
            export_run(run, tmp_path / "bundle", class_names=["river", "river"])
        assert not (tmp_path / "bundle").exists()


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The bundle without the domain encoder."""
    bundle = tmp_path_factory.mktemp("bundles") / "bundle"
    arguments = ["fastadapt", "export", str(run), "--out", str(bundle), "--domain-input"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", arguments)
        cli.main()
    assert not end.value.code
    return bundle


class TestDomainInput:
    """The graph's second input: domain features instead of the domain encoder."""

    def test_the_encoder_is_left_out(self, run, exported):
        bundle = exported
        manifest = json.loads((bundle / "manifest.json").read_text())
        images, features = manifest["model"]["inputs"]
        model = load_gdpl(run)
        width = model.domain_encoder.dim
        assert images["name"] == "images"
        assert features == {
            "name": "domain_features",
            "dtype": "float32",
            "shape": ["batch", width],
        }
        names = {t.name for t in onnx.load(bundle / "model.onnx").graph.initializer}
        assert names and not any("domain_encoder" in name for name in names)
        golden, _ = read_tensors(bundle / "golden.safetensors")
        assert golden["domain_features"].shape == (len(golden["images"]), width)
        preprocess = Preprocess.from_dict(manifest["source"]["config"]["preprocess"])
        with torch.no_grad():
            want = model(preprocess.normalize(golden["images"]))
        torch.testing.assert_close(golden["expected"], want, rtol=1e-5, atol=1e-5)
        predict, features = load(bundle), golden["domain_features"].numpy()
        found = predict(golden["images"], domain_features=features)
        torch.testing.assert_close(torch.from_numpy(found.logits), want, rtol=1e-4, atol=1e-4)
        with pytest.raises(fa.InputError, match="takes domain_features; given: nothing"):
            predict(golden["images"])
        with pytest.raises(fa.InputError, match=r"domain_features has 1 row;"):
            predict(golden["images"], domain_features=features[:1])
        assert verify_bundle(bundle, speed=False).passed

    def test_other_features_give_other_logits(self, exported, tmp_path):
        shutil.copytree(exported, tmp_path / "bundle")
        file = tmp_path / "bundle" / "golden.safetensors"
        golden, metadata = read_tensors(file)
        golden["domain_features"] = golden["domain_features"].flip(0).contiguous()
        write_tensors(file, golden, metadata)
        reseal(tmp_path / "bundle")
        assert not verify_bundle(tmp_path / "bundle", speed=False).passed

    def test_a_golden_file_without_an_input(self, exported):
        session = onnx_session(exported / "model.onnx")
        golden, _ = read_tensors(exported / "golden.safetensors")
        del golden["domain_features"]
        names = [value.name for value in session.get_inputs()]
        with pytest.raises(fa.InputError, match="lacks the model's input 'domain_features'"):
            golden_inputs(golden, names, {"normalization_in_graph": True})

    def test_features_that_were_computed_before(self, run, tmp_path):
        source = replace(save_source(tmp_path / "clip"), domain_encoder=WIDTH)
        model = randomize(source.create(NAMES, GDPLConfig(depth=2, rank_depth=1)))
        save_gdpl(model, tmp_path / "model", source)
        images = tmp_path / "images"
        make_colours(images, NAMES, count=2)
        with pytest.raises(fa.InputError, match="give those of the images with `domain_features="):
            export_run(tmp_path / "model", tmp_path / "bundle", images=images)
        vectors = {f"{n}/{i}.png": torch.randn(WIDTH) for n in NAMES for i in range(2)}
        write_tensors(tmp_path / "f.safetensors", vectors)
        result = export_run(
            tmp_path / "model",
            tmp_path / "bundle",
            images=images,
            domain_features=tmp_path / "f.safetensors",
        )
        assert result.manifest["model"]["inputs"][1]["shape"] == ["batch", WIDTH]
        golden, _ = read_tensors(tmp_path / "bundle" / "golden.safetensors")
        rows = {tuple(row.tolist()) for row in golden["domain_features"]}
        assert rows == {tuple(vector.tolist()) for vector in vectors.values()}
        (row,) = [row for row in result.fold_report.layers if row.kind == "DomainPromptLearner"]
        assert row.probe == "example"
        assert verify_bundle(tmp_path / "bundle", speed=False).passed

    def test_features_that_the_model_makes_itself(self, run, tmp_path):
        with pytest.raises(fa.InputError, match="has a domain encoder of its own"):
            export_run(run, tmp_path / "bundle", domain_features=tmp_path / "f.safetensors")
