import numpy as np
import pytest
import tifffile
from PIL import Image

from fastadapt.data.two_bytes import read_two_bytes


@pytest.mark.parametrize(
    "options",
    [
        {"byteorder": "<"},
        {"byteorder": ">"},
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True, "byteorder": ">"},
        {"tile": (16, 16)},
        {"rowsperstrip": 3},
    ],
)
@pytest.mark.parametrize("channels", [3, 4])
def test_tiff_that_libtiff_decodes(tmp_path, options, channels):
    values = np.random.default_rng(0).integers(0, 65536, (33, 20, channels)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="rgb", **options)
    with (tmp_path / "x.tif").open("rb") as file:
        assert np.array_equal(read_two_bytes(file, "TIFF"), values)


def test_eight_bits_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with (tmp_path / "x.png").open("rb") as file, pytest.raises(ValueError, match="raw mode RGB"):
        read_two_bytes(file, "PNG")
