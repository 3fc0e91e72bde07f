"""Read 16-bit colour with Pillow, which keeps one byte of each value.

Pillow has no mode of 16-bit colour. Its unpackers, named after the file's byte order, take the
upper bytes: ``"RGB;16B"`` of big-endian values. The unpacker of the other order then takes the
lower ones, and two passes over the file give the whole values::

    value = 256 · upper + lower
"""

from __future__ import annotations

import sys
from typing import IO, Any

import numpy as np
from PIL import Image

_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def read_two_bytes(file: IO[bytes], kind: str) -> np.ndarray:
    """Read a PNG or TIFF file of 16-bit colour, or a PNG of 16-bit gray with alpha.

    Args:
        file: open, at any position.
        kind: ``"PNG"`` or ``"TIFF"``.

    Returns:
        uint16 [H, W, C], with C = 2 for gray with alpha; as stored, without the turn that a PNG's
        orientation tag asks for.

    Raises:
        ValueError: the values have no 16 bits each, or are not unpacked in this way.
    """
    rawmode = _rawmode(file, kind)
    if rawmode == "LA;16B":  # four bytes a pixel, which are taken as they are
        channels = _unpack(file, kind, "RGBA")
        return channels[..., ::2] * 256 + channels[..., 1::2]
    base, _, order = rawmode.rpartition(";16")
    if base not in ("RGB", "RGBA") or order not in _OTHER_ORDER:
        raise ValueError(f"16-bit values are not read from raw mode {rawmode}")
    lower = _unpack(file, kind, f"{base};16{_OTHER_ORDER[order]}")
    return _unpack(file, kind, rawmode) * 256 + lower


def _rawmode(file: IO[bytes], kind: str) -> str:
    file.seek(0)
    with Image.open(file, formats=(kind,)) as image:
        arguments: Any = image.tile[0][3]  # the raw mode, or a tuple that it is the first of
    return str(arguments if isinstance(arguments, str) else arguments[0])


def _unpack(file: IO[bytes], kind: str, rawmode: str) -> np.ndarray:
    """Decode with an unpacker by name; uint16 [H, W, C] of bytes."""
    file.seek(0)
    with Image.open(file, formats=(kind,)) as image:
        tiles: Any = []
        for tile in image.tile:
            arguments: Any = tile[3]
            arguments = rawmode if isinstance(arguments, str) else (rawmode, *arguments[1:])
            # A named tuple since Pillow 11.
            changed = (*tile[:3], arguments)
            tiles.append(changed if type(tile) is tuple else type(tile)(*changed))
        image.tile = tiles
        return np.asarray(image).astype(np.uint16)
