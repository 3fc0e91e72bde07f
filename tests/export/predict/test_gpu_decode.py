"""A GPU decodes plain JPEG files, processes all others: the same pixels, places and problems."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastadapt.data.decode_pool import Reading
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError
from fastadapt.export.predict.decode_ahead import compute, open_decoder
from fastadapt.export.predict.decoders import decoder_on
from fastadapt.export.predict.gpu_decode import GpuDecoder, apply_geometry, read_plain_jpeg

CPU = torch.device("cpu")
WIDTH = 24 * 24 * 3  # values of an image in the first geometry
GEOMETRIES = [
    Geometry(24, 24, "bicubic", 0.875, "center"),
    Geometry(20, 28, "bilinear", 1.0, "squash"),
    Geometry(26, 22, "bicubic", 1.0, "border"),
    Geometry(64, 64, "bilinear", 1.0, "center"),  # larger than most: borders
]


def picture(seed, width, height):
    """Smooth colours: what a camera sees, rather than noise, in which rounding is all."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + seed) + c) + np.cos(y / (7 + c) + seed) for c in range(3)]
    return Image.fromarray((np.stack(waves, -1) * 60 + 128).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEG files of two sizes, and all that a GPU does not decode as Pillow does."""
    folder = tmp_path_factory.mktemp("jpegs")
    for i in range(6):
        picture(i, *((60, 44), (41, 50))[i % 2]).save(folder / f"{i}.jpg", quality=92)
    picture(6, 60, 44).convert("L").save(folder / "6-gray.jpg", quality=92)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(7, 60, 44).save(folder / "7-turned.jpg", exif=turned)
    picture(8, 60, 44).convert("CMYK").save(folder / "8-cmyk.jpg")
    picture(9, 60, 44).save(folder / "9-rgb.jpg", keep_rgb=True)
    picture(10, 60, 44).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "c.jpg").write_bytes((folder / "0.jpg").read_bytes()[:-300])  # truncated
    return folder


def decoded(decoder, paths, batch=4):
    found, problems = {}, {}
    batches = (paths[i : i + batch] for i in range(0, len(paths), batch))
    with decoder as decode:
        for number, result in enumerate(decode(batches)):
            computed = compute(result, lambda pixels: pixels.reshape(len(pixels), -1), WIDTH)
            values = zip(computed.rows, computed.values, strict=True)
            found |= {number * batch + row: value for row, value in values}
            problems |= {number * batch + row: why for row, why in computed.problems.items()}
    return found, problems


def test_plain_jpegs_are_told_from_others(folder):
    plain = {path.name for path in folder.iterdir() if read_plain_jpeg(str(path)) is not None}
    assert plain == {*(f"{i}.jpg" for i in range(6)), "6-gray.jpg"}
    assert read_plain_jpeg(str(folder / "not-there.jpg")) is None


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry_is_that_of_pillow(geometry):
    for width, height in ((60, 44), (41, 90), (24, 24)):
        image = picture(width, width, height)
        expected = np.asarray(geometry.apply(image)).astype(int)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        result = apply_geometry(geometry, pixels)[0].permute(1, 2, 0).numpy()
        assert np.abs(result - expected).max() <= 1  # roundings in between differ


def check_same(folder, device, tolerance):
    paths = sorted(map(str, folder.iterdir()))
    reading = Reading(GEOMETRIES[0])
    expected, problems = decoded(open_decoder(reading, None, 4, 1), paths)
    result, own_problems = decoded(GpuDecoder(reading, 4, 1, device), paths)
    assert own_problems == problems and set(result) == set(expected)
    assert [paths[place][-5:] for place in problems] == ["b.jpg", "c.jpg"]
    for place, values in expected.items():
        assert np.abs(result[place] - values).max() <= tolerance, paths[place]


def test_same_pixels_places_and_problems(folder):
    check_same(folder, CPU, 2)


@pytest.mark.gpu
def test_same_on_a_gpu(folder):
    check_same(folder, torch.device("cuda"), 6)


def test_what_a_gpu_cannot_do_is_said():
    geometry = GEOMETRIES[0]
    with pytest.raises(InputError, match="intensity range of 5:200"):
        GpuDecoder(Reading(geometry, (5.0, 200.0)), 4, 1, CPU)
    with pytest.raises(InputError, match="asks for lanczos"):
        GpuDecoder(Reading(Geometry(8, 8, "lanczos")), 4, 1, CPU)
    with pytest.raises(InputError, match="computes on a CPU"):
        decoder_on("gpu", "cpu")
    assert decoder_on("cpu", "cpu") is open_decoder
