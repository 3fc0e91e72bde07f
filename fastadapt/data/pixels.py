"""Bring pixel values of any type to 8-bit RGB.

With stored values v, a range [LOW, HIGH] and a type's own range as the default::

    (1)  y = round(255 · (v − LOW) / (HIGH − LOW)), clipped to 0 … 255
    (2)  y = 255 − y                                 where the file says that 0 is white
    (3)  y = y · alpha / 255                         transparent pixels become black

The own range of unsigned 16-bit values is 0 … 65535, so that (1) divides by 257; that of signed
ones is −32768 … 32767. Floating-point values have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastadapt.errors import InputError

ValueRange = tuple[float, float]
PART = 2**22  # values that are scaled at a time
EIGHT_BITS = "8-bit unsigned"
_TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")


@dataclass(frozen=True)
class DeepImage:
    """An image whose values 8 unsigned bits do not hold, as its file stores them.

    Attributes:
        values: [H, W] or [H, W, 3], integers or floating-point.
        bits: of a value in the file, 12 in one that packs 12-bit values.
        white_is_zero: 0 is white (TIFF's MinIsWhite).
        alpha: uint8 [H, W], by which colours are still to be multiplied.
    """

    values: np.ndarray
    bits: int
    white_is_zero: bool = False
    alpha: np.ndarray | None = None

    @property
    def type_name(self) -> str:
        """Name the type in words, for messages."""
        kind = {"u": "unsigned", "i": "signed", "f": "floating-point"}[self.values.dtype.kind]
        return f"{self.bits}-bit {kind}"

    def type_range(self, name: str) -> ValueRange:
        """Return the smallest and the largest value that the type holds.

        Integers of more than 16 bits are taken for 16-bit ones where their values allow it.

        Args:
            name: of the image, for the error message.

        Raises:
            InputError: the values are floating-point, or beyond 16 bits.
        """
        kind, bits = self.values.dtype.kind, self.bits
        if kind == "f":
            raise InputError(
                f"{name} holds floating-point values, whose range is not known: say it with "
                "`intensity_range=LOW:HIGH`, or save the image as 8 or 16 bit"
            )
        if bits > 16:
            if self.values.min(initial=0) < 0 or self.values.max(initial=0) > 65535:
                raise InputError(
                    f"{name} holds 32-bit values outside 0–65535: say their range with "
                    "`intensity_range=LOW:HIGH`, or save it as 16-bit"
                )
            return 0, 65535
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind == "i" else (0, 2**bits - 1)


def type_name(image: Image.Image | DeepImage) -> str:
    """Name the type of an image's values in words, for messages."""
    return image.type_name if isinstance(image, DeepImage) else EIGHT_BITS


def stored_values(image: Image.Image | DeepImage) -> np.ndarray:
    """Return values as :func:`to_eight_bit_rgb` scales them, without alpha: [H, W] or [H, W, 3]."""
    if isinstance(image, DeepImage):
        return image.values
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def check_values(image: Image.Image | DeepImage, name: str) -> None:
    """Refuse an image with values that are NaN or infinite.

    Args:
        image: decoded.
        name: of the image, for the error message.

    Raises:
        InputError: it has such values.
    """
    floating = isinstance(image, DeepImage) and image.values.dtype.kind == "f"
    if floating and not np.isfinite(stored_values(image)).all():
        raise InputError(f"{name} holds NaN or infinite values: replace them")


def range_for(
    image: Image.Image | DeepImage, value_range: ValueRange | None, name: str
) -> ValueRange:
    """Return the values of an image that become 0 and 255.

    Args:
        image: decoded.
        value_range: LOW and HIGH; ``None`` for the range of the image's own type.
        name: of the image, for error messages.

    Raises:
        InputError: the type has no range of its own and none is given; the image has 8 bits, and
            the range is of deeper ones.
    """
    if value_range is None:
        return (0, 255) if isinstance(image, Image.Image) else image.type_range(name)
    low, high = value_range
    if isinstance(image, Image.Image) and (low < 0 or high > 255):
        raise InputError(
            f"{name} has 8 bits, but the intensity range is {low:g}:{high:g}, that of deeper "
            "images: give images of one kind"
        )
    return value_range


def to_eight_bit_rgb(
    image: Image.Image | DeepImage, value_range: ValueRange | None, name: str
) -> Image.Image:
    """Scale values and convert them to 8-bit RGB, by the equations of this module.

    Args:
        image: decoded; a Pillow image of 8 bits or less per value, or a deep one.
        value_range: LOW and HIGH; ``None`` for the range of the image's own type.
        name: of the image, for error messages.

    Raises:
        InputError: as :func:`check_values` and :func:`range_for`.
    """
    check_values(image, name)
    low, high = range_for(image, value_range, name)
    if isinstance(image, DeepImage):
        scaled = _scale(image.values, low, high)
        if image.white_is_zero:
            scaled = 255 - scaled
        picture = Image.fromarray(scaled)
        if image.alpha is not None:
            picture = picture.convert("RGB")
            picture.putalpha(Image.fromarray(image.alpha))
        return _on_black(picture)
    if (low, high) == (0, 255):
        return _on_black(image)
    transparent = _is_transparent(image)
    table = eight_bit_table(low, high).tolist()
    picture = image.convert("RGBA" if transparent else "RGB")
    return _on_black(picture.point(table * 3 + list(range(256)) * transparent))


def eight_bit_table(low: float, high: float) -> np.ndarray:
    """Return what equation (1) makes of the values of 8 bits, uint8 [256]."""
    return _scale(np.arange(256), low, high)


def _scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Apply equation (1), in parts that bound the memory for intermediate values."""
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, PART // max(1, values[:1].size))
    for start in range(0, len(values), rows):
        part = (values[start : start + rows].astype(np.float64) - low) * 255 / (high - low)
        scaled[start : start + rows] = np.rint(part).clip(0, 255)
    return scaled


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in _TRANSPARENT or "transparency" in image.info


def _on_black(image: Image.Image) -> Image.Image:
    """Convert an 8-bit image to RGB; transparent pixels become black in proportion."""
    if _is_transparent(image):
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image.alpha_composite(rgba)
    return image.convert("RGB")
