"""TIFF files of every type: the expected pixels are computed from the values that were written."""

import importlib.util
import struct

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image, ImageOps

from fastadapt.data.decode import decode, load_image
from fastadapt.data.tiff import upright
from fastadapt.errors import InputError

RNG = np.random.default_rng(0)
TYPES = (np.uint8, np.int8, np.uint16, np.int16)


def noise(dtype, *shape):
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max + 1, shape).astype(dtype)


def scaled(values, low, high):
    """What 8-bit values should be, by exact integers: round(255 (v - low) / (high - low))."""
    distance = values.astype(object) - low
    return np.array((510 * distance + (high - low)) // (2 * (high - low)), float).clip(0, 255)


def expected(values, white_is_zero=False):
    info = np.iinfo(values.dtype)
    pixels = scaled(values, int(info.min), int(info.max))
    pixels = 255 - pixels if white_is_zero else pixels
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, -1)


def written(folder, values, **options):
    tifffile.imwrite(folder / "x.tif", values, **options)
    return folder / "x.tif"


@settings(max_examples=120, deadline=None)
@given(
    values=st.sampled_from(TYPES).flatmap(
        lambda t: npst.arrays(t, st.tuples(st.integers(6, 9), st.integers(6, 9)))
    ),
    photometric=st.sampled_from(("minisblack", "miniswhite")),
    compression=st.sampled_from((None, "zlib")),
    byteorder=st.sampled_from("<>"),
    layout=st.sampled_from(({}, {"rowsperstrip": 2}, {"tile": (16, 16)}, {"bigtiff": True})),
)
def test_gray(tmp_path_factory, values, photometric, compression, byteorder, layout):
    path = written(
        tmp_path_factory.mktemp("gray"),
        values,
        photometric=photometric,
        compression=compression,
        byteorder=byteorder,
        **layout,
    )
    assert np.array_equal(load_image(path), expected(values, photometric == "miniswhite"))
    assert decode(path).dropped == ()


@settings(max_examples=60, deadline=None)
@given(
    values=st.sampled_from(TYPES).flatmap(lambda t: npst.arrays(t, (16, 17, 3))),
    planar=st.sampled_from(("contig", "separate")),
    compression=st.sampled_from((None, "zlib")),
    byteorder=st.sampled_from("<>"),
)
def test_colour(tmp_path_factory, values, planar, compression, byteorder):
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    path = written(
        tmp_path_factory.mktemp("colour"),
        stored,
        photometric="rgb",
        planarconfig=planar,
        compression=compression,
        byteorder=byteorder,
    )
    assert np.array_equal(load_image(path), expected(values))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("samples", "extra", "dropped"),
    [
        (4, ["unspecified"], ("channels after the third",)),
        (5, ["unspecified"] * 2, ("channels after the third",)),
        (7, ["unspecified"] * 4, ("channels after the third",)),
    ],
)
def test_channels_after_the_third_are_said(tmp_path, dtype, samples, extra, dropped):
    values = noise(dtype, 17, 16, samples)
    path = written(tmp_path, values, photometric="rgb", extrasamples=extra)
    assert np.array_equal(load_image(path), expected(values[..., :3]))
    assert decode(path).dropped == dropped


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("position", [0, 1])
def test_transparency_becomes_black(tmp_path, dtype, position):
    values = noise(dtype, 17, 16, 4 + position)
    extra = ["unspecified"] * position + ["unassalpha"]
    path = written(tmp_path, values, photometric="rgb", extrasamples=extra)
    top = np.iinfo(dtype).max
    alpha = np.rint(values[..., -1:] * (255 / top))
    right = expected(values[..., :3]) * alpha / 255
    assert np.abs(np.asarray(load_image(path)) - right).max() <= 0.5
    assert decode(path).dropped == ("channels after the third",) * position


def test_colours_that_alpha_has_multiplied_are_on_black_already(tmp_path):
    values = noise(np.uint16, 17, 16, 4)
    path = written(tmp_path, values, photometric="rgb", extrasamples=["assocalpha"])
    assert np.array_equal(load_image(path), expected(values[..., :3]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("channels", [2, 3, 5])
def test_channels_without_colour(tmp_path, dtype, planar, channels):
    values = noise(dtype, 17, 16, channels)
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    path = written(tmp_path, stored, photometric="minisblack", planarconfig=planar)
    used = values[..., :3] if channels > 2 else values[..., 0]
    assert np.array_equal(load_image(path), expected(used))
    (said,) = decode(path).dropped
    assert {2: "channels after the first", 3: "red, green", 5: "after the third"}[channels] in said


def test_gray_with_transparency(tmp_path):
    values = noise(np.uint16, 17, 16, 2)
    path = written(
        tmp_path, values, photometric="minisblack", planarconfig="contig", extrasamples=[2]
    )
    right = expected(values[..., 0]) * np.rint(values[..., 1:] / 257) / 255
    assert np.abs(np.asarray(load_image(path)) - right).max() <= 0.5
    assert decode(path).dropped == ()


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"volumetric": True}, {"ome": True}])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pages_after_the_first_are_said(tmp_path, dtype, options):
    values = noise(dtype, 6, 32, 32)
    path = written(tmp_path, values, photometric="minisblack", **options)
    assert np.array_equal(load_image(path), expected(values[0]))
    assert decode(path).dropped == ("pages after the first",)


def test_thumbnails_are_no_pages(tmp_path):
    values = noise(np.uint16, 32, 32)
    with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
        writer.write(values)
        writer.write(values[::2, ::2], subfiletype=1)
    assert decode(tmp_path / "x.tif").dropped == ()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint32, np.int32])
def test_values_without_a_known_range_need_one(tmp_path, dtype):
    values = np.arange(-100, 156).reshape(16, 16).astype(dtype)
    if np.dtype(dtype).kind == "u":
        values = values.astype(np.int64).astype(dtype)  # wraps around: beyond 16 bits
    path = written(tmp_path, values)
    with pytest.raises(InputError, match="`intensity_range=LOW:HIGH`"):
        load_image(path)
    low, high = float(values.min()), float(values.max())
    got = np.asarray(load_image(path, (low, high)))
    assert got.min() == 0 and got.max() == 255
    if np.dtype(dtype).kind != "u":
        assert np.array_equal(got[..., 0], np.arange(256).reshape(16, 16))


def test_16_bit_values_in_32_bits_are_read_as_before(tmp_path):
    values = noise(np.uint16, 16, 16)
    path = written(tmp_path, values.astype(np.uint32))
    assert np.array_equal(load_image(path), expected(values))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(tmp_path, bad):
    values = np.ones((8, 8), np.float32)
    values[3, 3] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        load_image(written(tmp_path, values), (0, 1))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, dtype, orientation):
    values = noise(dtype, 9, 7)
    tags = [(274, "H", 1, orientation, True)]
    path = written(tmp_path, values, extratags=tags)
    assert np.array_equal(load_image(path), expected(upright(values, orientation)))
    image = Image.fromarray(noise(np.uint8, 9, 7))
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        right = np.asarray(ImageOps.exif_transpose(opened))
    assert np.array_equal(upright(np.asarray(image), orientation), right)


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_compressions_of_gray_that_libtiff_knows(tmp_path, compression, dtype, white):
    values = noise(dtype, 20, 30)
    tags = {262: 0} if white else {}
    Image.fromarray(values).save(tmp_path / "x.tif", compression=compression, tiffinfo=tags)
    with tifffile.TiffFile(tmp_path / "x.tif") as file:
        assert (file.pages[0].photometric == 0) == white
    inverted = white and dtype == np.uint16  # Pillow inverts 8-bit values itself when it writes
    assert np.array_equal(load_image(tmp_path / "x.tif"), expected(values, inverted))


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_truncated_files_are_refused(tmp_path, dtype, options, keep):
    path = written(tmp_path, noise(dtype, 64, 64), metadata=None, **options)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match=r"x\.tif"):
        load_image(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_headers_give_pixels_or_an_input_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "x.tif"
    tifffile.imwrite(path, noise(np.uint16, 16, 16), metadata=None)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, 255))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        image = load_image(path)
    except InputError:
        return
    assert image.mode == "RGB"


@pytest.mark.parametrize("field", ["offset", "count", "more"])
def test_missing_parts_are_no_black_pixels(tmp_path, field):
    """tifffile fills them with zeros."""
    path = written(tmp_path, noise(np.uint16, 32, 32), tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as file:
        tags = file.pages[0].tags
        if field == "more":
            tags["ImageLength"].overwrite(48)
        else:
            tag = tags["TileOffsets" if field == "offset" else "TileByteCounts"]
            tag.overwrite([*tag.value[:-1], 0])
    with pytest.raises(InputError, match="lacks strips or tiles"):
        load_image(path)


def test_a_small_file_cannot_ask_for_all_memory(tmp_path):
    path = written(tmp_path, noise(np.uint16, 64, 64), compression="zlib", metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            file.pages[0].tags[name].overwrite(60_000)
    with pytest.raises(InputError, match="60000 × 60000 pixels, which is too many"):
        load_image(path)


def test_kinds_without_a_reading_are_refused(tmp_path):
    values = noise(np.uint16, 16, 16, 4)
    with pytest.raises(InputError, match="16-bit SEPARATED TIFF: save it as RGB"):
        load_image(written(tmp_path, values, photometric="separated"))
    with pytest.raises(InputError, match="complex64"):
        load_image(written(tmp_path, np.zeros((8, 8), np.complex64)))


def lzw(content):
    """Encode bytes in TIFF's LZW with codes of 9 bits alone: literals, and the table cleared."""
    codes = []
    for start in range(0, len(content), 200):
        codes += [256, *content[start : start + 200]]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def one_strip(path, strip, shape, bits, photometric, compression=1):
    """Write a little-endian TIFF by hand, with what the writers at hand don't know."""
    height, width, samples = shape
    depths = struct.pack(f"<{samples}H", *[bits] * samples)
    entries = [(256, width), (257, height), (258, bits), (259, compression), (262, photometric)]
    entries += [(273, 400), (277, samples), (278, height), (279, len(strip))]
    content = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, value in entries:
        if tag == 258 and samples > 2:
            content += struct.pack("<HHII", tag, 3, samples, 300)
        else:
            content += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    content = (content + bytes(4)).ljust(300, b"\0") + depths
    path.write_bytes(content.ljust(400, b"\0") + strip)
    return path


@pytest.mark.parametrize("photometric", [0, 1, 2])
def test_lzw_of_16_bits(tmp_path, photometric):
    values = noise(np.uint16, 20, 30, 3 if photometric == 2 else 1)
    strip = lzw(values.astype("<u2").tobytes())
    path = one_strip(tmp_path / "x.tif", strip, values.shape, 16, photometric, 5)
    colours = values if photometric == 2 else values[..., 0]
    assert np.array_equal(load_image(path), expected(colours, photometric == 0))


def test_values_packed_in_12_bits_fill_their_type(tmp_path):
    values = RNG.integers(0, 4096, (20, 30)).astype(np.uint16)
    bits = "".join(f"{value:012b}" for value in values.reshape(-1))
    strip = int(bits, 2).to_bytes(len(bits) // 8, "big")
    path = one_strip(tmp_path / "x.tif", strip, (20, 30, 1), 12, 1)
    right = scaled(values, 0, 4095)
    assert np.array_equal(np.asarray(load_image(path))[..., 0], right)
    assert np.array_equal(np.asarray(load_image(path, (0, 4095)))[..., 0], right)


def test_what_needs_a_package_names_it(tmp_path):
    values = noise(np.uint16, 20, 30, 4)
    strip = lzw(values.astype("<u2").tobytes())
    path = one_strip(tmp_path / "x.tif", strip, values.shape, 16, 2, 5)
    if importlib.util.find_spec("imagecodecs") is None:
        with pytest.raises(InputError, match=r"imagecodecs: pip install 'fastadapt\[tiff\]'"):
            load_image(path)
    else:
        assert load_image(path).size == (30, 20)


@pytest.mark.parametrize(
    ("tag", "value", "says"),
    [
        ("PlanarConfiguration", 3, "PlanarConfiguration is 3"),
        ("ImageWidth", 2**20, "lacks strips or tiles"),
    ],
)
def test_a_damaged_page_of_8_bits_is_refused(tag, value, says, tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(np.uint8, 19, 23, 3), photometric="rgb", tile=(16, 16))
    assert load_image(path).size == (23, 19)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages.first.tags[tag].overwrite(value)
    with pytest.raises(InputError, match=says):
        load_image(path)
