"""Images: what is read must be what Pillow, or torchvision, reads of the same bytes."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageOps

from fastadapt.data.decode import load_image
from fastadapt.data.formats import FORMATS
from tests.helpers.fuzz.image_files import mutate_image, sound_images
from tests.helpers.fuzz.target import ACCEPTED, UNJUDGED, Target

SUFFIXES = (".png", ".jpg", ".tif", ".bmp", ".webp")


class Images(Target):
    """Damaged images of every format, under any of the usual names."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.sound = sound_images()

    def check(self, choose: random.Random, scratch: Path) -> str:
        """Read a damaged image; compare with Pillow."""
        _, data = mutate_image(choose, self.sound)
        path = scratch / f"image{choose.choice(SUFFIXES)}"
        path.write_bytes(data)
        return judge(np.asarray(load_image(path)), data)


def judge(found: np.ndarray, data: bytes) -> str:
    """Compare the pixels that were read of some bytes with those that Pillow reads.

    16-bit colour and some TIFF files are not Pillow's: of these the upper bytes are compared, where
    Pillow reads any.
    """
    try:
        expected, slack = _by_pillow(data)
    except Exception as error:  # whatever a decoder raises
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return UNJUDGED  # read by tifffile alone
        return f"accepted what Pillow refuses ({type(error).__name__}: {error})"
    if expected is None:
        return UNJUDGED
    if found.shape != expected.shape:
        return f"shape {found.shape}, Pillow's {expected.shape}"
    furthest = np.abs(found.astype(int) - expected.astype(int)).max(initial=0)
    return ACCEPTED if furthest <= slack else f"pixels differ from Pillow's by {furthest}"


def _by_pillow(data: bytes) -> tuple[np.ndarray | None, int]:
    """Return uint8 [H, W, 3], and by how many levels other arithmetic may differ."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind, tags = image.format, dict(getattr(image, "tag_v2", {262: 1}))
        white_is_zero = tags.get(262, 0) == 0
        if kind == "TIFF" and not _tags_are_whole(data, tags):
            return None, 0  # Pillow leaves out all entries after a damaged one
        image.load()
        with contextlib.suppress(Exception):  # damaged metadata costs the turn
            image = ImageOps.exif_transpose(image)
        if kind == "TIFF" and image.mode not in ("L", "RGB", "I;16", "I;16B", "P", "1", "CMYK"):
            return None, 0  # whose meaning tifffile knows better
        if image.mode.startswith("I;16"):
            values = np.asarray(image).astype(float) / 257
            gray = np.rint(255 - values if white_is_zero else values)
            return np.repeat(gray[..., None], 3, -1), 1
        if image.mode in ("I", "F"):
            return None, 0
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = np.asarray(image.convert("RGBA")).astype(float)
            return np.rint(rgba[..., :3] * rgba[..., 3:] / 255), 1
        return np.asarray(image.convert("RGB")), 1 if kind in ("PNG", "TIFF") else 0


def _tags_are_whole(data: bytes, tags: dict[int, object]) -> bool:
    """Say whether Pillow has read the entries that tifffile reads."""
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        return all(tag.code in tags or tag.code > 32000 for tag in tiff.pages.first.tags)
