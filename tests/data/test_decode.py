import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from fastadapt.data.decode import decode, load_image, to_rgb
from fastadapt.data.formats import FORMATS
from fastadapt.data.plain_jpeg import read_plain_jpeg
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


def png_of_16_bits(path, values, colour_type, chunks=()):
    """Write a PNG whose 16-bit colour Pillow cannot write."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_png_of_16_bits_is_divided_by_257(tmp_path, colour_type, channels):
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, channels)).astype(np.uint16)
    path = png_of_16_bits(tmp_path / "x.png", values, colour_type)
    right = np.rint(values / 257)
    colours = right[..., :3] if channels > 2 else right[..., :1]
    alpha = right[..., -1:] if channels in (2, 4) else 255
    right = np.broadcast_to(colours * alpha / 255, (9, 7, 3))
    assert np.abs(np.asarray(load_image(path)) - right).max() <= (0.5 if channels in (2, 4) else 0)
    if channels == 3:
        scaled = np.rint((values.astype(float) - 1000) * 255 / 3000).clip(0, 255)
        assert np.array_equal(load_image(path, (1000, 4000)), scaled)


def test_deep_colour_png_is_turned(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    exif = Image.Exif()
    exif[274] = 6
    path = tmp_path / "x.png"
    png_of_16_bits(path, values, 2, [(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))])
    assert np.array_equal(load_image(path), np.rint(np.rot90(values, -1) / 257))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    "exif",
    [b"\0\x08\0\x02\x01\x12\0\x03", b"Exif\0\0MM\0*\0\0", b"x" * 40, b"Exif\0\0II*\0\xff\xff"],
)
def test_damaged_exif_costs_the_turn_alone(tmp_path, suffix, exif):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 4, 3), np.uint8))
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    with Image.open(tmp_path / f"x.{suffix}") as opened:
        right = np.asarray(opened.convert("RGB"))
    assert np.array_equal(load_image(tmp_path / f"x.{suffix}"), right)
    with Image.open(tmp_path / f"x.{suffix}") as opened:
        assert np.array_equal(to_rgb(opened), right)


def test_a_file_starts_no_other_program(tmp_path, monkeypatch):
    def started(*args, **kwargs):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\n"
    for name in ("x.png", "x.eps"):
        (tmp_path / name).write_bytes(eps)
        with pytest.raises(InputError, match="no format that is read"):
            load_image(tmp_path / name)


def test_the_content_counts_not_the_name(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
    image.save(tmp_path / "x.jpg")
    shutil.copy(tmp_path / "x.jpg", tmp_path / "x.png")
    assert np.array_equal(load_image(tmp_path / "x.png"), load_image(tmp_path / "x.jpg"))
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    shutil.copy(tmp_path / "deep.tif", tmp_path / "deep.jpg")
    assert np.array_equal(
        np.asarray(load_image(tmp_path / "deep.jpg"))[..., 0], np.rint(deep / 257)
    )


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_frames_after_the_first_are_said(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 255)]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert decode(path).dropped == ("frames after the first",)
    assert np.asarray(load_image(path)).max() == 0
    frames[1].save(path)
    assert decode(path).dropped == ()


def test_deep_values_that_pillow_would_cut_are_refused(tmp_path):
    header = struct.pack(">HBBHHHH", 474, 0, 2, 3, 4, 4, 3).ljust(512, b"\0")
    (tmp_path / "x.sgi").write_bytes(header + bytes(4 * 4 * 3 * 2))
    with pytest.raises(InputError, match=r"x\.sgi holds values of 16 bits.*PNG or TIFF"):
        load_image(tmp_path / "x.sgi")
    if "JPEG2000" in FORMATS:
        for mode in ("RGB", "L"):
            Image.new(mode, (8, 8)).save(tmp_path / "x.jp2")
            assert load_image(tmp_path / "x.jp2").size == (8, 8)
        Image.new("RGB", (8, 8)).save(tmp_path / "x.jp2")
        content = bytearray((tmp_path / "x.jp2").read_bytes())
        content[content.index(b"\xff\x4f\xff\x51") + 42] = 15
        (tmp_path / "x.jp2").write_bytes(content)
        with pytest.raises(InputError, match="16 bits"):
            load_image(tmp_path / "x.jp2")


@pytest.mark.parametrize("maximum", [255, 4095, 65535])
@pytest.mark.parametrize("kind", [b"P5", b"P6"])
def test_portable_maps_have_a_range_of_their_own(tmp_path, kind, maximum):
    shape = (4, 4) if kind == b"P5" else (4, 4, 3)
    values = np.random.default_rng(0).integers(0, maximum + 1, shape)
    content = values.astype(">u2" if maximum > 255 else "u1").tobytes()
    (tmp_path / "x.ppm").write_bytes(b"%s 4 4 %d\n" % (kind, maximum) + content)
    right = np.rint(values * 255 / maximum).reshape(4, 4, -1)
    assert np.abs(np.asarray(load_image(tmp_path / "x.ppm")) - right).max() == 0


def test_images_that_pillow_opened_are_read_alike(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "x.png")
    Image.fromarray(deep).save(tmp_path / "white.tif", tiffinfo={262: 0})
    for name in ("x.png", "white.tif"):
        with Image.open(tmp_path / name) as opened:
            for value_range in (None, (100, 3000)):
                right = load_image(tmp_path / name, value_range)
                assert np.array_equal(to_rgb(opened, value_range), right)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)  # opened, it would wait for a writer for ever
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"a\.jpg is a .*; expected a file"):
        load_image(path)
    assert read_plain_jpeg(path) is None
