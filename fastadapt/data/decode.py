"""Turn an image file of any supported format into 8-bit RGB pixels.

A file is opened once, by what it holds rather than by its name: TIFF files by
:mod:`fastadapt.data.tiff`, everything else by Pillow's decoders of
:mod:`fastadapt.data.formats`, and no others. Of 16-bit colour Pillow keeps the upper bytes alone,
so that :mod:`fastadapt.data.two_bytes` reads it twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastadapt.data import tiff
from fastadapt.data.formats import FORMATS
from fastadapt.data.pixels import DeepImage, ValueRange, to_eight_bit_rgb
from fastadapt.data.two_bytes import read_two_bytes
from fastadapt.errors import InputError, first_line
from fastadapt.files import check_ordinary

T = TypeVar("T")

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH, _PNG_COLOUR = 24, 25  # places in the file of IHDR's bit depth and colour type
_JPEG2000_SIZES = b"\xff\x4f\xff\x51"  # start of codestream, then the marker of sizes
_JPEG2000 = (b"\0\0\0\x0cjP  ", _JPEG2000_SIZES)
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")


@dataclass(frozen=True)
class Decoded:
    """What an image file holds.

    Attributes:
        image: upright; a Pillow image where 8 bits hold its values, else a deep one.
        dropped: what of the file is not in ``image``, in words that complete "some images lose".
    """

    image: Image.Image | DeepImage
    dropped: tuple[str, ...] = ()


def decode(path: str | os.PathLike[str]) -> Decoded:
    """Decode an image file without scaling its values.

    Raises:
        InputError: the file is missing, damaged, truncated, no ordinary file or no image.
    """
    try:
        check_ordinary(path)
        with Path(path).open("rb") as file:
            return _decode(file, str(path))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{path} cannot be read as an image: by its content it has no format that is read"
        ) from None
    except Exception as error:  # decoders raise almost anything on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} cannot be read as an image: {reason}") from None


def load_image(path: str | os.PathLike[str], value_range: ValueRange | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Grayscale is repeated three times; transparent pixels become black in proportion; a camera's
    orientation tag is applied, unless it is damaged.

    Args:
        path: of the file.
        value_range: the values that become 0 and 255; ``None`` for the range of the file's type,
            so that 16-bit values are divided by 257.

    Raises:
        InputError: as :func:`decode` and :func:`fastadapt.data.pixels.to_eight_bit_rgb`.
    """
    return load_and_tell(path, value_range)[0]


def load_and_tell(
    path: str | os.PathLike[str], value_range: ValueRange | None = None
) -> tuple[Image.Image, tuple[str, ...]]:
    """Read an image file as :func:`load_image`; return what of it is dropped, too."""
    decoded = decode(path)
    return to_eight_bit_rgb(decoded.image, value_range, str(path)), decoded.dropped


def read_or_say(read: Callable[[str], T], path: str) -> T | str:
    """Read an image, or return why it cannot be read."""
    try:
        return read(path)
    except InputError as error:
        return str(error)
    except Exception as error:  # an image that Pillow decodes and cannot convert, say
        return f"{path} cannot be read as an image: {first_line(error)}"


def to_rgb(image: Image.Image, value_range: ValueRange | None = None) -> Image.Image:
    """Convert an image that Pillow has opened to 8-bit RGB, as :func:`load_image` does.

    Of 16-bit colour Pillow keeps the upper bytes alone: give the file's path instead.

    Raises:
        InputError: as :func:`fastadapt.data.pixels.to_eight_bit_rgb`.
    """
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == tiff.WHITE_IS_ZERO
    deep = _deepened(_upright(image), white_is_zero)
    return to_eight_bit_rgb(deep, value_range, "the image")


def _decode(file: IO[bytes], name: str) -> Decoded:
    head = file.read(64 * 1024)
    file.seek(0)
    dropped: tuple[str, ...] = ()
    if head.startswith(tiff.MAGIC):
        deep, dropped = tiff.read_tiff(file, name)
        if deep is not None:
            return Decoded(deep, dropped)
        file.seek(0)
    _check_depth(head, name)
    with Image.open(file, formats=FORMATS) as image:
        if head.startswith(_PNG) and head[_PNG_DEPTH] == 16 and head[_PNG_COLOUR] != 0:
            return Decoded(_read_deep_png(file, _orientation(image)))
        if image.format in _ANIMATED and getattr(image, "is_animated", False):
            dropped = ("frames after the first",)
        image.load()
        return Decoded(_deepened(_upright(image)), dropped)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the orientation tag; damaged metadata costs the turn and nothing else."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as in _orientation
        return image


def _deepened(image: Image.Image, white_is_zero: bool = False) -> Image.Image | DeepImage:
    """Take values out of Pillow's modes of more than 8 bits."""
    if image.mode == "F":
        return DeepImage(np.asarray(image), 32)
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    values = values.astype(values.dtype.newbyteorder("="))
    return DeepImage(values, 8 * values.dtype.itemsize, white_is_zero)


def _read_deep_png(file: IO[bytes], orientation: int) -> DeepImage:
    """Read a PNG of 16-bit colour, or of gray with alpha."""
    values = tiff.upright(read_two_bytes(file, "PNG"), orientation)
    colours = values[..., :3] if values.shape[-1] >= 3 else values[..., 0]
    if values.shape[-1] == 3:
        return DeepImage(colours, 16)
    return DeepImage(colours, 16, alpha=np.rint(values[..., -1] / 257).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """Return the orientation tag; 1 where there is none, or damaged metadata."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # whatever struct, ElementTree or Pillow's parsers raise
        return 1


def _check_depth(head: bytes, name: str) -> None:
    """Refuse files whose deeper values Pillow cuts to 8 bits."""
    bits = 0
    if head.startswith(b"\x01\xda") and len(head) > 3:  # SGI
        bits = 8 * head[3]
    start = head.find(_JPEG2000_SIZES) if head.startswith(_JPEG2000) else -1
    if start >= 0 and len(head) > start + 42 and head[start + 41] >= 3:
        bits = (head[start + 42] & 0x7F) + 1
    if bits > 8:
        raise InputError(
            f"{name} holds values of {bits} bits in a format of which only 8 are read: save it as "
            "a 16-bit PNG or TIFF"
        )
