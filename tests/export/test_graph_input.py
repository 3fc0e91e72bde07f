"""What is inside a graph beside the model, and that no image means something else to it."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import fastadapt as fa
from fastadapt.data.preprocess import Preprocess
from fastadapt.export import export_onnx
from fastadapt.export.graph_input import GraphInput, check_settings, resize_as_graph

RNG = np.random.default_rng(0)
SQUARE = Preprocess((3, 64, 64), "bicubic", 0.875)
# Smaller, larger, square, wide and tall, odd sizes, a side that is the target's already.
SIZES = [(30, 45), (64, 64), (73, 73), (73, 200), (301, 160), (333, 334), (97, 640)]


def photo(height, width):
    """Smooth in parts, with edges and noise, as photographs are."""
    patches = RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC))
    return np.clip(smooth + RNG.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)


class TestArray:
    def test_uint8_is_the_image_as_decoded(self):
        images = RNG.integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
        array = GraphInput(SQUARE).array(images)
        assert array.dtype == np.uint8 and array.flags.c_contiguous
        assert np.array_equal(array, images.transpose(0, 2, 3, 1))

    def test_float_is_normalised_as_the_manifest_says(self):
        images = np.full((2, 3, 1, 1), 255, np.uint8)
        pre = Preprocess((3, 1, 1), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
        inside = GraphInput(pre, "float").array(images)
        outside = GraphInput(pre, "float", normalize=False).array(images)
        assert inside[0].ravel().tolist() == [1.0, 1.0, 1.0]
        assert outside[0].ravel().tolist() == [1.0, 3.0, 0.5]
        assert inside.dtype == outside.dtype == np.float32


class TestSettings:
    @pytest.mark.parametrize(
        "settings",
        [("uint8", True, False), ("uint8", True, True), ("float", True, False)],
    )
    def test_the_manifest_brings_them_back(self, settings):
        graph_input = GraphInput(SQUARE, *settings)
        written = graph_input.to_dict()
        assert GraphInput.from_dict(written) == graph_input
        inside = [step["step"].split("(")[0] for step in written["steps"] if step["in_graph"]]
        assert ("Resize" in inside) == settings[2]
        assert any("subtract mean" in step for step in inside)
        assert {"pillow", "timm"} <= written["versions"].keys()

    def test_a_bundle_of_schema_1_takes_floats(self):
        old = GraphInput.from_dict({**SQUARE.to_dict(), "normalization_in_graph": False})
        assert old == GraphInput(SQUARE, "float", normalize=False)

    @pytest.mark.parametrize(
        "settings,says",
        [
            (("int8", True, False), "input is 'int8'; expected uint8 or float"),
            (("uint8", False, False), "give `input='float'`"),
            (("float", True, True), "give `input='uint8'`"),
        ],
    )
    def test_what_excludes_each_other(self, settings, says):
        with pytest.raises(fa.InputError, match=says):
            check_settings(*settings)

    @pytest.mark.parametrize(
        "changes,says",
        [
            ({"interpolation": "lanczos"}, "no lanczos filter"),
            ({"crop_mode": "border"}, "crop_mode 'border'"),
            ({"input_size": (3, 32, 64)}, "32×64"),
        ],
    )
    def test_resizing_that_onnx_lacks(self, changes, says):
        pre = Preprocess(**{**SQUARE.to_dict(), **changes})
        with pytest.raises(fa.InputError, match=says):
            GraphInput(pre, resize=True)


class TestResize:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
    @pytest.mark.parametrize("crop", ["center", "squash"])
    def test_is_pillows_to_one_level(self, size, mode, crop):
        pre = Preprocess((3, 64, 64), mode, 0.875, crop)
        image = photo(*size)
        want = pre.transform(Image.fromarray(image)).numpy()
        got = resize_as_graph(image[None], pre)[0]
        assert got.shape == want.shape
        difference = np.abs(got.astype(int) - want)
        # Pillow may filter the columns of squashed images first: rounded once more, otherwise.
        assert difference.max() <= (1 if crop == "center" else 2)
        assert crop == "squash" or (difference > 0).mean() < 0.01

    @pytest.mark.parametrize("mode,levels", [("bilinear", 1), ("bicubic", 4)])
    def test_tall_images(self, mode, levels):
        """Pillow 13 filters the columns first, which bicubic's clipping in between shows."""
        pre = Preprocess((3, 64, 64), mode, 1.0)
        image = photo(620, 140)
        want = pre.transform(Image.fromarray(image)).numpy()
        got = resize_as_graph(image[None], pre)[0]
        assert np.abs(got.astype(int) - want).max() <= levels

    def test_sides_may_differ_when_squashed(self):
        pre = Preprocess((3, 32, 48), "bilinear", 1.0, "squash")
        image = photo(100, 80)
        got = resize_as_graph(image[None], pre)[0].astype(int)
        assert np.abs(got - pre.transform(Image.fromarray(image)).numpy()).max() <= 1

    def test_in_a_graph_with_any_size(self, tmp_path):
        model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))
        described = export_onnx(
            model,
            tmp_path / "m.onnx",
            input_size=(3, 64, 64),
            graph_input=GraphInput(SQUARE, resize=True),
        )
        assert described["inputs"][0]["shape"] == ["batch", "height", "width", 3]
        onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
        session = onnxruntime.InferenceSession(
            str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]
        )
        for batch, (height, width) in [(1, (80, 120)), (3, (200, 64))]:
            images = np.stack([photo(height, width) for _ in range(batch)])
            pixels = torch.stack([SQUARE.transform(Image.fromarray(image)) for image in images])
            with torch.no_grad():
                want = model(SQUARE.normalize(pixels)).numpy()
            got = session.run(None, {"images": images})[0]
            np.testing.assert_allclose(got, want, atol=2e-3)
