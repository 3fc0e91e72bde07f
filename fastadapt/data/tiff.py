"""Read what Pillow does not read of TIFF files: deep colour, signed values, many channels.

Plain 8-bit pages are left to Pillow, which knows every compression; this module then only says
what Pillow drops.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from PIL import Image

from fastadapt.data.pixels import DeepImage
from fastadapt.data.two_bytes import read_two_bytes
from fastadapt.errors import InputError

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # PhotometricInterpretation
UNASSOCIATED, ASSOCIATED = 2, 1  # ExtraSamples: alpha, and whether colours are multiplied by it
REDUCED, MASK = 1, 4  # bits of NewSubfileType: thumbnails and pyramids, masks
_FLIPS = {1: "", 2: "h", 3: "hv", 4: "v", 5: "t", 6: "th", 7: "thv", 8: "tv"}  # by Orientation

LEAST_LIMIT = 64 * 2**20  # bytes of pixels that any file may claim
MOST_COMPRESSED = 2000  # times a file's size that its pixels may have; deflate reaches 1,032

# It reports damage of files that we report ourselves.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def read_tiff(file: IO[bytes], name: str) -> tuple[DeepImage | None, tuple[str, ...]]:
    """Read the first page of a TIFF file.

    Args:
        file: open, at any position.
        name: of the file, for error messages.

    Returns:
        The image, upright; ``None`` if Pillow reads its pixels rightly. And what is dropped, or
        supposed, in words that complete "some images lose".

    Raises:
        InputError: the page holds something that has no reading as gray or RGB, or is compressed
            in a way that needs the package imagecodecs.
    """
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        notes = _dropped_pages(tiff)
        photometric, samples = int(page.photometric), page.samplesperpixel
        extra = [int(kind) for kind in page.extrasamples]
        if page.planarconfig not in (1, 2):
            raise InputError(f"{name} is damaged: its PlanarConfiguration is {page.planarconfig}")
        _check_size(page, file.seek(0, os.SEEK_END), name)
        plain = page.bitspersample <= 8 and int(page.sampleformat) == 1 and page.imagedepth == 1
        if plain and not (tiff.is_bigtiff and tiff.byteorder == ">"):  # which Pillow doesn't know
            by_pillow = {
                WHITE_IS_ZERO: samples == 1,
                BLACK_IS_ZERO: samples == 1 or (samples == 2 and _alpha_index(extra) == 0),
                RGB: page.planarconfig == 1 and samples <= 6 and extra[1:] == [0] * len(extra[1:]),
            }.get(photometric, True)
            if by_pillow:
                return None, notes + _extra_channels(photometric, samples, extra)
        if photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
            kind = getattr(page.photometric, "name", photometric)
            raise InputError(f"{name} is a {page.bitspersample}-bit {kind} TIFF: save it as RGB")
        tag = page.tags.get("Orientation")
        orientation = 1 if tag is None else tag.value
        try:
            values = _as_channels_last(page.asarray(), page.axes)
        except (ValueError, NotImplementedError) as error:
            if "imagecodecs" not in str(error):
                raise
            values = _by_pillow(file, page.dtype, samples, name)
            orientation = 1  # Pillow has applied it
        bits = page.bitspersample
    if values.dtype.kind not in "uif":
        raise InputError(f"{name} holds {values.dtype} values: save it as 8 or 16 bit")
    colours, alpha, lost = _split_channels(values, photometric, extra, bits)
    if alpha is not None:
        alpha = upright(alpha, orientation)
    image = DeepImage(upright(colours, orientation), bits, photometric == WHITE_IS_ZERO, alpha)
    return image, notes + lost


def _check_size(page: Any, file_size: int, name: str) -> None:
    """Refuse a page that lacks strips or tiles, or that claims more pixels than can be.

    Of damaged files tifffile fills such parts with zeros, and reserves whatever is claimed.

    Args:
        page: tifffile's.
        file_size: in bytes.
        name: of the file, for the error message.

    Raises:
        InputError: as said.
    """
    parts = math.prod(page.chunked)
    places, sizes = page.dataoffsets[:parts], page.databytecounts[:parts]
    lacking = parts < 1 or len(places) < parts or len(sizes) < parts
    if lacking or min(places) <= 0 or min(sizes) <= 0:
        raise InputError(f"{name} is damaged: it lacks strips or tiles of its pixels")
    pixels = page.imagewidth * page.imagelength
    if pixels > 2 * (Image.MAX_IMAGE_PIXELS or pixels) or page.nbytes > max(
        LEAST_LIMIT, MOST_COMPRESSED * file_size
    ):
        raise InputError(
            f"{name} claims {page.imagewidth} × {page.imagelength} pixels, which is too many for "
            f"its {file_size:,} bytes, or to be read at all"
        )


def _dropped_pages(tiff) -> tuple[str, ...]:  # type: ignore[no-untyped-def]  # of tifffile
    """Say whether there are images after the first, other than thumbnails and masks."""
    first = tiff.pages.first
    stacked = tiff.is_imagej and (tiff.imagej_metadata or {}).get("images", 1) > 1
    more = any(not page.subfiletype & (REDUCED | MASK) for page in tiff.pages[1:])
    if stacked or more or first.imagedepth > 1:
        return ("pages after the first",)
    return ()


def _as_channels_last(values: np.ndarray, axes: str) -> np.ndarray:
    """Bring a page to [H, W] or [H, W, C]; of a page with depth, take the first slice."""
    if "Z" in axes:
        values = values.take(0, axis=axes.index("Z"))
        axes = axes.replace("Z", "")
    if "S" in axes:
        values = np.moveaxis(values, axes.index("S"), -1)
    return values


def _by_pillow(file: IO[bytes], dtype: np.dtype | None, samples: int, name: str) -> np.ndarray:
    """Read gray values, or 16-bit colour, compressed in a way that only Pillow knows."""
    if samples == 3 and dtype == np.uint16:
        return read_two_bytes(file, "TIFF")
    if samples > 1:
        raise InputError(
            f"{name} is compressed in a way that needs the package imagecodecs: "
            "pip install 'fastadapt[tiff]', or save it uncompressed or with deflate"
        )
    file.seek(0)
    with Image.open(file, formats=("TIFF",)) as image:
        image.load()
        # Pillow widens signed 16-bit values and keeps the bits of unsigned 32-bit ones.
        return np.asarray(image).astype(dtype)


def _alpha_index(extra: Sequence[int]) -> int | None:
    """Return which of the extra samples is an alpha channel, if one is."""
    for index, kind in enumerate(extra):
        if kind in (UNASSOCIATED, ASSOCIATED):
            return index
    return None


def _extra_channels(photometric: int, samples: int, extra: Sequence[int]) -> tuple[str, ...]:
    """Say what Pillow makes of channels beyond the colours of an 8-bit page."""
    if photometric != RGB or samples == 3:
        return ()
    if not extra or extra[0] not in (0, UNASSOCIATED, ASSOCIATED):
        return ("a fourth channel, which is taken for transparency,",)
    return ("channels after the third",) if samples - 3 > (extra[0] != 0) else ()


def _split_channels(
    values: np.ndarray, photometric: int, extra: Sequence[int], bits: int
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Split [H, W, C] into colours [H, W] or [H, W, 3], alpha, and a note on what is dropped."""
    if values.ndim == 2:
        return values, None, ()
    channels = values.shape[-1]
    index = _alpha_index(extra)
    place = None if index is None else channels - len(extra) + index
    others = [c for c in range(channels) if c != place]
    # Three channels and more without a colour model are read as red, green, blue.
    used = others[:3] if len(others) >= 3 else others[:1]
    lost: tuple[str, ...] = ()
    if len(others) > len(used):
        lost = ("channels after the third",) if len(used) == 3 else ("channels after the first",)
    elif photometric != RGB and len(used) == 3:
        lost = ("nothing, but three channels are taken for red, green and blue,",)
    colours = values[..., used] if len(used) == 3 else values[..., used[0]]
    if place is None or index is None or extra[index] == ASSOCIATED:
        return colours, None, lost  # multiplied by alpha already: on black as they are
    top = {"f": 1.0, "i": 2.0 ** (bits - 1) - 1, "u": 2.0**bits - 1}[values.dtype.kind]
    alpha = np.rint(values[..., place] * (255 / top)).clip(0, 255).astype(np.uint8)
    return colours, alpha, lost


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the orientation tag of TIFF and EXIF (1 to 8) to [H, W, …].

    Any other value of the tag is ignored.
    """
    turns = _FLIPS.get(orientation, "")  # transpose, then flip left-right and up-down
    if "t" in turns:
        values = values.swapaxes(0, 1)
    if "h" in turns:
        values = values[:, ::-1]
    if "v" in turns:
        values = values[::-1]
    return values
