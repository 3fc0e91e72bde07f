"""Turn an image file of any supported format into 8-bit RGB pixels."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps

from fastadapt.errors import InputError


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as 8-bit RGB, as :func:`to_rgb` does.

    Raises:
        InputError: the file is missing, damaged, truncated or no image, or holds floating-point
            values, which have no known range.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} cannot be read as an image: {reason}") from None
    return _eight_bit_rgb(image, str(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode to 8-bit RGB.

    Grayscale is repeated three times; 16-bit images are divided by 257, so that the full range
    maps to the full range; transparent pixels become black in proportion; a camera's orientation
    tag is applied.

    Raises:
        InputError: it holds floating-point values, which have no known range, or 32-bit ones.
    """
    return _eight_bit_rgb(ImageOps.exif_transpose(image), "the image")


def _eight_bit_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale, in one of Pillow's guises
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise InputError(f"{name} holds 32-bit values outside 0–65535: save it as 16-bit")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise InputError(
            f"{name} holds floating-point values, whose range is not known: save it as 8 or 16 bit"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image.alpha_composite(rgba)
    return image.convert("RGB")
