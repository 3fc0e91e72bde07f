"""Test-time augmentation: in the model, after folding, and in what a run says of itself."""

import json
from dataclasses import replace

import pytest
import torch

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.symmetries import symmetric_views
from fastadapt.train import TrainConfig, train
from tests.helpers.imagesets import make_folders

ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=1.0, input_size=(3, 32, 32))


def test_views_are_the_square_s_symmetries():
    images = torch.rand(2, 3, 5, 5)
    views = symmetric_views(images, "dihedral").view(8, 2, 3, 5, 5)
    assert torch.equal(views[0], images)
    assert torch.equal(views[:4].flatten(0, 1), symmetric_views(images, "flips"))
    assert len({view[0].flatten().numpy().tobytes() for view in views}) == 8
    turned = [images.rot90(k, (2, 3)) for k in range(4)]
    assert all(any(torch.equal(turn, view) for view in views) for turn in turned)


@pytest.mark.parametrize("tta", ["flips", "dihedral"])
def test_a_model_averages_its_logits_in_evaluation(tta):
    plain = fa.adapt("test_vit", ADAPT, 3, pretrained=False).eval()
    model = fa.adapt(plain.backbone, replace(ADAPT, tta=tta), 3).eval()
    model.load_state_dict(plain.state_dict())
    images = torch.randn(3, 3, 32, 32)
    expected = plain(symmetric_views(images, tta)).unflatten(0, (-1, 3)).mean(0)
    torch.testing.assert_close(model(images), expected)
    for turn in (lambda x: x.flip(3), lambda x: x.flip(2)):  # so it says the same of both
        torch.testing.assert_close(model(turn(images)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fa.fold(model)(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.train()(images), plain(images))


def test_what_cannot_be_averaged():
    with pytest.raises(InputError, match="not features"):
        fa.adapt("test_vit", replace(ADAPT, tta="flips"), pretrained=False)
    wide = replace(ADAPT, tta="dihedral", input_size=(3, 32, 64))
    with pytest.raises(InputError, match="needs square images"):
        fa.adapt("test_efficientnet", wide, 3, pretrained=False)


def test_a_run_s_figures_are_those_of_the_averaging_model(tmp_path):
    data = make_folders(tmp_path / "data", 6)
    config = TrainConfig(epochs=1, batch_size=8, val_fraction=0.34, probe=False)
    averaging = replace(ADAPT, tta="flips")
    out = tmp_path / "run"
    train(data, out, "test_vit", config, averaging, pretrained=False, workers=1)
    rows = (out / "predictions.csv").read_text().splitlines()[1:]
    model = fa.load_adapter(out)
    assert model.config.tta == "flips"
    preprocess = Preprocess.from_dict(json.loads((out / "config.json").read_text())["preprocess"])
    for row in rows[:3]:
        path, *_, first, second, third = row.split(",")
        image = preprocess.normalize(preprocess.read(path)[None])
        said = torch.tensor([float(first), float(second), float(third)])
        torch.testing.assert_close(model(image).softmax(1)[0], said, rtol=1e-4, atol=1e-4)
