"""Folds, exported as one graph, with their temperatures and the decision of validation."""

import shutil

import numpy as np
import onnx
import pytest
import torch

import fastadapt as fa
from fastadapt.errors import InputError
from fastadapt.export import export_run, load
from fastadapt.export.bundle.verify import verify_bundle
from fastadapt.files import read_json, write_json
from fastadapt.train import FoldSettings, TrainConfig, load_folds, train_folds
from tests.helpers.bundles import reseal
from tests.helpers.imagesets import CLASSES, make_folders
from tests.helpers.shallow_models import SHALLOW_VIT

ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=0.5, input_size=(3, 32, 32))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three folds of 60 images with a threshold and a band, and their bundle."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ensemble")
    data = make_folders(folder / "data", 33, CLASSES[:2])
    for path in sorted((data / "lying").iterdir())[:6]:  # hard: the other class's stripes
        shutil.copy(data / "crossed" / path.name, path)
        (data / "crossed" / path.name).unlink()
    config = TrainConfig(
        epochs=2, lr=3e-3, batch_size=16, threshold="balanced_accuracy", abstain=0.1
    )
    out = folder / "out"
    train_folds(
        data, out, SHALLOW_VIT, config, ADAPT, FoldSettings(folds=3), pretrained=False, workers=1
    )
    # One seed alone gives 1; see tests/train/test_ensemble_fit.py for how it is fitted.
    summary = read_json(out / "folds.json")
    assert (
        summary["ensemble"]["val"] | {"images": 60, "runs_per_image": 1}
        == (summary["ensemble"]["val"])
    )
    assert summary["ensemble"]["temperature"] == pytest.approx(1, abs=0.2)
    summary["ensemble"]["temperature"] = 0.8
    write_json(out / "folds.json", summary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastadapt.export.bundle.build.measure", lambda *args: {"1": 1.0})
        export_run(out, folder / "bundle")
    return folder


def images_of(folder, count=8):
    return sorted((folder / "data").rglob("*.png"))[:: 60 // count]


def test_the_graph_is_the_mean_of_the_calibrated_runs(made):
    ensemble = load_folds(made / "out")
    assert ensemble.shared and len(ensemble.members) == 3
    runs = [fa.load_adapter(made / "out" / f"fold-{number}") for number in (1, 2, 3)]
    predictor = load(made / "bundle")
    paths = images_of(made)
    preprocess = predictor.graph_input.preprocess
    pixels = torch.stack([preprocess.read(path) for path in paths])
    with torch.no_grad():
        images = preprocess.normalize(pixels)
        mean = torch.stack([run(images) for run in runs]).mean(0) / 0.8
        torch.testing.assert_close(ensemble(images), mean, rtol=1e-4, atol=1e-5)
    assert predictor(paths).logits == pytest.approx(mean.numpy(), rel=1e-3, abs=1e-3)
    graph = onnx.load(made / "bundle" / "model.onnx").graph
    attention = [n for n in graph.node if n.op_type == "Softmax"]
    assert len(attention) == 2 + 3  # of its blocks, which run once, and of three adapters
    manifest = read_json(made / "bundle" / "manifest.json")
    temperatures = [
        read_json(made / "out" / f"fold-{number}" / "config.json")["temperature"]
        for number in (1, 2, 3)
    ]
    assert manifest["calibration"] == {"temperature": temperatures, "ensemble": 0.8}
    assert manifest["source"]["folds"] == ["fold-1", "fold-2", "fold-3"]
    assert {parity["stage"] for parity in manifest["parity"]} >= {"folding", "end to end"}


def test_the_decision_of_all_validation_images_is_applied(made):
    manifest = read_json(made / "bundle" / "manifest.json")
    decision = manifest["decision"]
    assert decision["criterion"] == "balanced_accuracy" and decision["band"] is not None
    predictor = load(made / "bundle")
    found = predictor(sorted((made / "data").rglob("*.png")))
    low, high = decision["band"]
    p = found.probabilities[:, 1]
    wanted = np.where(p > decision["threshold"], *reversed(predictor.classes))
    wanted[(p > low) & (p < high)] = ""
    assert found.labels == wanted.tolist()


def test_bundles_say_how_good_the_model_is(made):
    report = (made / "bundle" / "report.html").read_text()
    for text in (
        "How good the model is",
        "3 runs, each on images",
        "linear probe",
        "95 % interval",
        "and their mean by 0.8",
    ):
        assert text in report
    quality = read_json(made / "bundle" / "manifest.json")["quality"]
    assert quality["images"] == 60 and quality["runs"] == 3
    assert set(quality["mean"]) == {"model", "linear_probe", "difference"}


def test_a_bundle_without_these_keys_takes_the_likeliest_class(made, tmp_path):
    bundle = shutil.copytree(made / "bundle", tmp_path / "bundle")
    manifest = read_json(bundle / "manifest.json")
    for key in ("decision", "calibration", "quality"):
        del manifest[key]
    write_json(bundle / "manifest.json", manifest)
    reseal(bundle)
    predictor = load(bundle)
    assert predictor.decision.plain
    assert verify_bundle(bundle, speed=False).passed
    reseal(bundle, decision={"threshold": 7.0})
    with pytest.raises(InputError, match=r"'decision\.threshold' is 7\.0"):
        load(bundle)


def test_unfinished_folds_are_not_exported(made, tmp_path):
    out = shutil.copytree(made / "out", tmp_path / "out")
    write_json(out / "folds.json", read_json(out / "folds.json") | {"finished": False})
    with pytest.raises(InputError, match="is not finished"):
        export_run(out, tmp_path / "bundle")
