import numpy as np
import pytest
import torch
from PIL import Image

from fastadapt.data.augment import AUGMENTS, check_augment, read_view
from fastadapt.data.preprocess import Preprocess, is_image_file, load_image
from fastadapt.errors import InputError
from tests.helpers.imagesets import truncate

PLAIN = Preprocess((3, 32, 32), crop_pct=1.0)


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


@pytest.mark.parametrize(
    "wrong",
    [{"crop_pct": 0}, {"crop_pct": 2}, {"crop_mode": "left"}, {"interpolation": "cubic"}, {"x": 1}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Preprocess.from_dict({"input_size": [3, 32, 32], **wrong})


def test_dictionary_and_back():
    assert Preprocess.from_dict(PLAIN.to_dict()) == PLAIN


def test_normalize():
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(PLAIN.mean)) / torch.tensor(PLAIN.std)
    assert torch.allclose(PLAIN.normalize(images)[0, :, 0, 0], expected)


def test_image_files_by_name(tmp_path):
    names = ("a.png", "b.JPG", "c.tiff", ".hidden.png", "notes.txt")
    assert [is_image_file(tmp_path / n) for n in names] == [True, True, True, False, False]


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("augment", AUGMENTS)
def test_views_depend_on_their_seed_alone(photo, augment):
    plain = read_view(photo, PLAIN, augment)
    views = [read_view(photo, PLAIN, augment, (0, 0, number)) for number in range(1, 30)]
    again = [read_view(photo, PLAIN, augment, (0, 0, number)) for number in range(1, 30)]
    assert torch.equal(plain, PLAIN.read(photo))
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    different = {view.numpy().tobytes() for view in views}
    assert len(different) == {"none": 1, "flips": 4, "dihedral": 8, "crops": 29}[augment]
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in views)


def test_symmetries_keep_every_pixel(photo):
    plain = read_view(photo, PLAIN, "dihedral")
    for number in range(1, 9):
        view = read_view(photo, PLAIN, "dihedral", (0, 0, number))
        assert torch.equal(view.flatten(1).sort().values, plain.flatten(1).sort().values)


def test_augmentations_that_cannot_be():
    with pytest.raises(InputError, match="blur"):
        check_augment("blur", PLAIN)
    with pytest.raises(InputError, match="square"):
        check_augment("dihedral", Preprocess((3, 32, 48)))
