import json
import sys

import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt import cli
from fastadapt.export import export_run, fold_with_report, verify_bundle
from fastadapt.gdpl import DomainEncoder, GDPLConfig, GDPLTrainConfig, train_gdpl
from fastadapt.gdpl.fold import FoldedPromptLearner
from tests.gdpl_models import clip_model, make_colours, save_source
from tests.test_gdpl import SMALL, WIDTH, randomize, small_model

NAMES = ("annual_crop", "forest", "harbour", "industrial_area", "river")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run; its learning rate is so high that every part has an effect."""
    folder = tmp_path_factory.mktemp("gdpl")
    source = save_source(folder / "clip")
    data = make_colours(folder / "data", NAMES)
    config = GDPLTrainConfig(shots=2, epochs=1, lr=0.05, optimizer="adamw", val_fraction=0.4)
    train_gdpl(data, folder / "run", source, config, GDPLConfig(depth=3, rank_depth=2))
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
