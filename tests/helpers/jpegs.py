"""JPEG files of two sizes, and all that a GPU does not decode as Pillow does."""

from pathlib import Path

import numpy as np
from PIL import Image

PLAIN = {*(f"{i}.jpg" for i in range(6)), "6-gray.jpg", "d-large.jpg"}
UNREADABLE = {"b.jpg", "c.jpg"}


def smooth(seed: int, width: int, height: int) -> Image.Image:
    """Draw smooth colours: what a camera sees, rather than noise, in which rounding is all."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + seed) + c) + np.cos(y / (7 + c) + seed) for c in range(3)]
    return Image.fromarray((np.stack(waves, -1) * 60 + 128).astype(np.uint8))


def write_jpegs(folder: Path) -> Path:
    """Write one file of each kind; the last one is larger than processes hand over."""
    for i in range(6):
        smooth(i, *((60, 44), (41, 50))[i % 2]).save(folder / f"{i}.jpg", quality=92)
    smooth(6, 60, 44).convert("L").save(folder / "6-gray.jpg", quality=92)
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth(7, 60, 44).save(folder / "7-turned.jpg", exif=turned)
    smooth(8, 60, 44).convert("CMYK").save(folder / "8-cmyk.jpg")
    smooth(9, 60, 44).save(folder / "9-rgb.jpg", keep_rgb=True)
    smooth(10, 60, 44).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "c.jpg").write_bytes((folder / "0.jpg").read_bytes()[:-300])  # truncated
    comment = b"\xff\xfe\xff\xff" + bytes(0xFFFF - 2)
    file = (folder / "1.jpg").read_bytes()
    (folder / "d-large.jpg").write_bytes(file[:2] + 5 * comment + file[2:])
    return folder
