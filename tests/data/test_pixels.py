import numpy as np
import pytest
from PIL import Image

from fastadapt.data.pixels import DeepImage, stored_values, to_eight_bit_rgb
from fastadapt.errors import InputError

GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def scale(image, value_range=None):
    return np.asarray(to_eight_bit_rgb(image, value_range, "x.png"))


def test_a_twelve_bit_camera_keeps_its_levels():
    values = np.linspace(734, 2639, 1697).round().astype(np.uint16).reshape(1, -1)
    assert len(np.unique(scale(DeepImage(values, 16)))) == 8
    assert len(np.unique(scale(DeepImage(values, 16), (0, 4095)))) == 119
    assert len(np.unique(scale(DeepImage(values, 16), (734, 2639)))) == 256


def test_packed_twelve_bits_have_a_range_of_their_own():
    values = np.array([[0, 2048, 4095]], np.uint16)
    assert scale(DeepImage(values, 12))[0, :, 0].tolist() == [0, 128, 255]


def test_values_outside_the_range_are_clipped():
    values = np.array([[-1000, 0, 50, 100, 3000]], np.int16)
    assert scale(DeepImage(values, 16), (0, 100))[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    inverted = DeepImage(values, 16, white_is_zero=True)
    assert scale(inverted, (0, 100))[0, :, 0].tolist() == [255, 255, 127, 0, 0]


def test_ordinary_images_are_what_pillow_converts():
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    for image in (Image.fromarray(GRAY), colour, colour.quantize(), colour.convert("CMYK")):
        right = np.asarray(image.convert("RGB"))
        assert np.array_equal(scale(image), right)
        assert np.array_equal(scale(image, (0, 255)), right)


def test_a_range_for_8_bits():
    got = scale(Image.fromarray(GRAY), (100, 200))
    right = np.rint((GRAY.astype(float) - 100) * 255 / 100).clip(0, 255)
    assert np.array_equal(got, np.repeat(right[..., None], 3, -1))
    with pytest.raises(InputError, match=r"x\.png has 8 bits, .* 0:4095"):
        scale(Image.fromarray(GRAY), (0, 4095))


def test_a_range_leaves_transparency_alone():
    image = Image.new("RGBA", (2, 1), (150, 200, 100, 255))
    image.putpixel((0, 0), (150, 200, 100, 0))
    assert scale(image, (100, 200))[0].tolist() == [[0, 0, 0], [128, 255, 0]]


def test_values_that_are_measured_are_those_that_are_scaled():
    assert stored_values(Image.fromarray(GRAY)).shape == (16, 16)
    assert stored_values(Image.new("RGBA", (4, 3), (1, 2, 3, 0))).tolist() == [[[1, 2, 3]] * 4] * 3
    assert stored_values(Image.new("1", (2, 2), 1)).max() == 255
