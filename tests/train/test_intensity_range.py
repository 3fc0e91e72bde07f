"""One rule for the values of deep images, from training to a bundle's predictions."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import fastadapt as fa
from fastadapt.data.dataset import read_dataset
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.export import export_run
from fastadapt.train.config import TrainConfig
from fastadapt.train.run import train

LOW, HIGH = 734, 2639
ADAPT = fa.AdaptConfig(rank=4, num_centers=2, mlp_ratio=1.0, input_size=(3, 32, 32))


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """16-bit TIFFs of a 12-bit camera: two classes, of the same levels if divided by 257."""
    root = tmp_path_factory.mktemp("camera")
    rng = np.random.default_rng(0)
    for label, base in (("bright", 1340), ("dark", 1300)):
        (root / label).mkdir()
        for index in range(12):
            values = (base + rng.integers(-8, 9, (40, 40))).astype(np.uint16)
            values[0, :2] = LOW, HIGH
            tifffile.imwrite(root / label / f"{index:02d}.tif", values)
    return root


def run(camera, out, setting, **options):
    config = TrainConfig(epochs=2, batch_size=8, intensity_range=setting, **options)
    torch.manual_seed(0)
    return train(camera, out, "test_resnet", config, ADAPT, pretrained=False, workers=1)


@pytest.mark.parametrize(
    ("setting", "recorded"),
    [
        ("dtype", None),
        ("auto", [0, 4095]),
        (f"{LOW}:{HIGH}", [LOW, HIGH]),
        ("0%:100%", [LOW, HIGH]),
    ],
)
def test_a_run_records_what_its_images_were_read_with(tmp_path, camera, setting, recorded):
    run(camera, tmp_path / "run", setting)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["preprocess"]["intensity_range"] == recorded
    assert config["train"]["intensity_range"] == setting
    preprocess = Preprocess.from_dict(config["preprocess"])
    values = tifffile.imread(camera / "dark" / "00.tif").astype(float)
    low, high = recorded or (0, 65535)
    right = np.rint((values - low) * 255 / (high - low)).astype(np.uint8)
    plain = Preprocess((3, 40, 40), crop_pct=1.0, intensity_range=preprocess.intensity_range)
    assert np.array_equal(plain.read(camera / "dark" / "00.tif")[0], right)


def test_a_bundle_reads_as_the_training_did(tmp_path, camera):
    # Without the average, after which all logits of so short a run are nearly the same.
    run(camera, tmp_path / "run", "auto", val_fraction=0.4, ema=0.0)
    export_run(tmp_path / "run", tmp_path / "bundle", speed=False)
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["preprocessing"]["intensity_range"] == [0, 4095]
    assert "values from 0 to 4095 to 0–255" in manifest["preprocessing"]["steps"][0]["step"]

    predict = fa.export.load(tmp_path / "bundle", device="cpu")
    model = fa.load_adapter(tmp_path / "run").eval()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    preprocess = Preprocess.from_dict(config["preprocess"])
    paths = [sample.path for sample in read_dataset(camera).samples]
    with torch.no_grad():
        pixels = torch.stack([preprocess.read(path) for path in paths])
        right = model(preprocess.normalize(pixels)).numpy()
    np.testing.assert_allclose(predict(paths).logits, right, atol=1e-4 * right.std())
    arrays = [tifffile.imread(path) for path in paths]
    pictures = [Image.fromarray(array) for array in arrays]
    for given in (arrays, pictures, [np.repeat(a[..., None], 3, -1) for a in arrays]):
        np.testing.assert_allclose(predict(given).logits, right, atol=1e-4 * right.std())
    with pytest.raises(InputError, match="has 8 bits, but the intensity range is 0:4095"):
        predict(np.zeros((40, 40, 3), np.uint8))


def test_resuming_with_another_range_is_refused(tmp_path, camera):
    run(camera, tmp_path / "run", "auto")
    config = TrainConfig(epochs=2, batch_size=8, intensity_range="dtype")
    with pytest.raises(InputError, match=r"intensity_range is None, but was \[0\.0, 4095\.0\]"):
        train(camera, tmp_path / "run", "test_resnet", config, ADAPT, pretrained=False, resume=True)


@pytest.mark.parametrize("setting", ["12bit", "9:1", "1%:400"])
def test_settings_that_are_none_are_refused(setting):
    with pytest.raises(InputError, match="intensity_range"):
        TrainConfig(intensity_range=setting)
