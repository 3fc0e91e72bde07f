"""The second output of exported files: the features before the head, compared like the first."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_run, export_timm, load
from fastadapt.export.bundle.verify import verify_bundle
from fastadapt.export.features import Features, WithFeatures
from fastadapt.export.precision.half import MixedPrecision, precision_units
from fastadapt.files import read_json, read_tensors, write_tensors
from fastadapt.symmetries import symmetric_views
from tests.helpers.bundles import reseal
from tests.helpers.command import command
from tests.helpers.shallow_models import SHALLOW_VIT


@pytest.fixture(scope="module")
def bundle(made, tmp_path_factory):
    """Export the run with features."""
    out = tmp_path_factory.mktemp("features") / "bundle"
    export_run(made / "run", out, with_features=True, speed=False)
    return out


def expected(run, paths):
    model = fa.load_adapter(run)
    preprocess = Preprocess.from_dict(read_json(run / "config.json")["preprocess"])
    images = preprocess.normalize(torch.stack([preprocess.read(path) for path in paths]))
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True).numpy()


def test_a_bundle_embeds_and_predicts_with_embeddings(made, bundle, tmp_path, monkeypatch):
    manifest = read_json(bundle / "manifest.json")
    assert [output["name"] for output in manifest["model"]["outputs"]] == ["logits", "features"]
    assert [task["kind"] for task in manifest["tasks"]] == ["classification", "features"]
    stages = {row["stage"] for row in manifest["parity"]}
    assert {f"{s}, features" for s in ("folding", "ONNX Runtime", "end to end")} < stages
    paths = sorted(str(path) for path in (made / "images").rglob("*.png"))
    want = expected(made / "run", paths)

    args = (made / "images", "--workers", 1, "--out")
    assert command(monkeypatch, "embed", bundle, *args, tmp_path / "o.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == paths
    np.testing.assert_allclose([row["features"] for row in rows], want, atol=1e-4)

    tables = []
    for name in ("bundle", "run"):
        out, model = tmp_path / f"{name}.csv", bundle if name == "bundle" else made / "run"
        more = ("--embeddings", "--logits", "--labels", "folders")
        assert command(monkeypatch, "predict", model, *args, out, *more) == 0
        with out.open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    for one, other, features in zip(*tables, want, strict=True):
        assert one["prediction"] == other["prediction"]
        for row in (one, other):
            found = [float(row[f"embeddings_{i}"]) for i in range(want.shape[1])]
            np.testing.assert_allclose(found, features, atol=1e-4)
        for name in ("crack", "good"):
            assert abs(float(one[f"logits_{name}"]) - float(other[f"logits_{name}"])) < 1e-4


def test_features_of_a_run_with_tta_are_means_over_views(made, tmp_path, monkeypatch):
    config = fa.AdaptConfig(rank=8, num_centers=3, input_size=(3, 32, 32), tta="dihedral")
    model = fa.adapt(SHALLOW_VIT, config, 2, weights=str(made / "weights.pth")).eval()
    preprocess = Preprocess.from_pretrained_cfg(model.pretrained_cfg)
    run, out = tmp_path / "run", tmp_path / "out.jsonl"
    labels = ["crack", "good"]
    fa.save_adapter(model, run, labels=labels, preprocess=preprocess.to_dict())
    shutil.copy(made / "run" / "splits.csv", run)
    export_run(run, tmp_path / "bundle", with_features=True, speed=False)
    paths = sorted(str(path) for path in (made / "images").rglob("*.png"))
    images = preprocess.normalize(torch.stack([preprocess.read(path) for path in paths]))
    with torch.no_grad():
        views = model.forward_features(symmetric_views(images, "dihedral"))
        features = model.forward_head(views, pre_logits=True).unflatten(0, (8, -1)).mean(0)
        logits = model(images)
    for source in (run, tmp_path / "bundle"):
        more = ("--out", out, "--workers", 1, "--embeddings", "--logits", "--overwrite")
        assert command(monkeypatch, "predict", source, made / "images", *more) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        np.testing.assert_allclose([row["embeddings"] for row in rows], features, atol=1e-4)
        found = [[row["logits"][label] for label in labels] for row in rows]
        np.testing.assert_allclose(found, logits, atol=1e-4)


def test_verify_compares_features(bundle):
    result = verify_bundle(bundle, speed=False)
    assert result.passed
    assert any(parity.stage.endswith("golden, model.onnx") for parity in result.parities)
    (artefact,) = result.artefacts
    found = [parity for parity in artefact.parity if parity.stage.endswith(", features")]
    assert found and all(parity.passed and parity.error < 1e-3 for parity in found)


def test_wrong_features_are_found(bundle, tmp_path):
    wrong = shutil.copytree(bundle, tmp_path / "wrong")
    tensors, metadata = read_tensors(wrong / "golden.safetensors")
    tensors["expected_features"] = tensors["expected_features"].flip(0)
    write_tensors(wrong / "golden.safetensors", tensors, metadata)
    reseal(wrong)
    result = verify_bundle(wrong, speed=False)
    assert not result.passed
    del tensors["expected_features"]
    write_tensors(wrong / "golden.safetensors", tensors, metadata)
    reseal(wrong)
    with pytest.raises(fa.InputError, match="holds no fp32 'expected_features'"):
        verify_bundle(wrong, speed=False)


def test_the_modules_agree_in_every_precision(folded_model):
    module, images = folded_model.module, folded_model.example[0]
    with torch.no_grad():
        logits, features = WithFeatures(module)(images)
        torch.testing.assert_close(logits, module(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features, Features(module)(images))
        half = MixedPrecision(module, torch.bfloat16, precision_units(module, images))
        rounded, close = WithFeatures(half)(images)
        torch.testing.assert_close(rounded, half(images), atol=0.05, rtol=0.05)
    assert close.dtype == torch.float32
    torch.testing.assert_close(close, features, atol=0.1, rtol=0.1)


def test_what_has_no_features_to_give(made, bundle, tmp_path):
    with pytest.raises(fa.InputError, match="leave out `trt`, `fused`, `int8` and `fp8`"):
        export_run(
            made / "run",
            tmp_path / "out",
            with_features=True,
            engines=fa.export.EngineOptions(int8=True),
        )
    with pytest.raises(fa.InputError, match="its output is the features"):
        export_timm(
            SHALLOW_VIT,
            tmp_path / "out",
            checkpoint=made / "weights.pth",
            image_size=32,
            features=True,
            with_features=True,
        )
    plain = load(made / "bundle")
    assert plain.num_features == 0 and load(bundle).num_features == 64
    with pytest.raises(fa.InputError, match="export it with `with_features=True`"):
        plain.run_features(np.zeros((1, 32, 32, 3), np.uint8))
