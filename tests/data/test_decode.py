import numpy as np
import pytest
from PIL import Image

from fastadapt.data.decode import load_image
from fastadapt.errors import InputError
from tests.helpers.imagesets import truncate


@pytest.fixture
def gradient():
    return np.arange(32 * 32).reshape(32, 32)


def test_grayscale_is_repeated(tmp_path, gradient):
    values = (gradient // 4).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "gray.png")
    image = np.asarray(load_image(tmp_path / "gray.png"))
    assert image.shape == (32, 32, 3)
    assert (image == values[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_maps_the_full_range_to_the_full_range(tmp_path, gradient, suffix):
    values = np.round(gradient / gradient.max() * 65535).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    image = np.asarray(load_image(tmp_path / f"deep.{suffix}"))
    assert (image == np.round(values / 257).astype(np.uint8)[..., None]).all()
    assert image.min() == 0 and image.max() == 255


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_become_black(tmp_path, mode):
    image = Image.new(mode, (8, 8), (200, 200, 200, 255) if mode == "RGBA" else (200, 255))
    image.putpixel((0, 0), (200, 200, 200, 0) if mode == "RGBA" else (200, 0))
    image.save(tmp_path / "alpha.png")
    values = np.asarray(load_image(tmp_path / "alpha.png"))
    assert values[0, 0].tolist() == [0, 0, 0]
    assert values[1, 1].tolist() == [200, 200, 200]


def test_palette_transparency_and_bilevel(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(load_image(tmp_path / "p.png"))[0, 0].tolist() == [0, 255, 0]
    Image.new("1", (4, 4), 1).save(tmp_path / "b.png")
    assert np.asarray(load_image(tmp_path / "b.png"))[0, 0].tolist() == [255] * 3


def test_orientation_tag_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 8)


def test_damaged_files_are_named(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.png", "cut.jpg"):
        noise.save(tmp_path / name)
        truncate(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name in ("cut.png", "cut.jpg", "text.png", "empty.png", "float.tif", "gone.png"):
        with pytest.raises(InputError, match=name):
            load_image(tmp_path / name)


def test_32_bit_values_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(InputError, match="16-bit"):
        load_image(tmp_path / "wide.tif")
