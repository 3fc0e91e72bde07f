"""Tell JPEG files that a GPU decodes as Pillow does from all others, without importing torch."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastadapt.data.pixels import ValueRange
from fastadapt.files import check_ordinary

_ORIENTATION, _UPRIGHT = 0x0112, 1
_RGB = [ord(letter) for letter in "RGB"]  # ids of components that are not luma and chroma


class PlainJpeg(NamedTuple):
    """A JPEG file that a GPU decodes: its bytes, and its pixels' number."""

    data: bytes
    pixels: int


def read_plain_jpeg(
    path: str | os.PathLike[str], value_range: ValueRange | None = None
) -> PlainJpeg | None:
    """Read a file if it is a JPEG that a GPU decodes as Pillow does.

    That is a whole one of 8 bits, in gray or in luma and chroma, that need not be turned. ``None``
    for all others, also for those that cannot be read: whoever decodes them says why.

    Args:
        path: of the file.
        value_range: as for :func:`fastadapt.data.decode.load_image`.
    """
    if value_range is not None and (value_range[0] < 0 or value_range[1] > 255):
        return None  # of deeper images: those of 8 bits are refused
    try:
        check_ordinary(path)
        data = Path(path).read_bytes()
        if not data.startswith(b"\xff\xd8\xff") or not data.rstrip(b"\0").endswith(b"\xff\xd9"):
            return None  # nvJPEG takes a truncated file for a whole one
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.format != "JPEG" or image.mode not in ("L", "RGB"):
                return None
            if image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT:
                return None
            if image.mode == "RGB" and _is_rgb_inside(image):
                return None
            return PlainJpeg(data, image.width * image.height)
    except Exception:  # Pillow raises almost anything on damaged files
        return None


def _is_rgb_inside(image: Image.Image) -> bool:
    """Say whether a JPEG holds red, green and blue rather than luma and chroma."""
    components = [layer[0] for layer in getattr(image, "layer", [])]
    return image.info.get("adobe_transform") == 0 or components == _RGB
