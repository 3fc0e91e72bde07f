"""Name the image formats that are read, and the file names that they have.

The list is explicit. Of what Pillow registers it leaves out formats that Pillow can only write
(PDF) or only names (HDF5, GRIB, MPEG), those that it hands to another program (EPS starts
Ghostscript, whatever the file is called), and FITS, whose values it scales by a rule of its own.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

_NAMED = (
    *("PNG", "JPEG", "MPO", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF"),
    *("TGA", "PCX", "PSD", "QOI", "SGI", "SUN", "ICO", "ICNS", "IM", "MSP", "XBM", "XPM"),
)
_EXTENSIONS = Image.registered_extensions()  # loads all plugins, so that Image.OPEN is complete

# Builds of Pillow differ: one without libwebp or libavif does not know these.
FORMATS = tuple(name for name in _NAMED if name in Image.OPEN)
EXTENSIONS = frozenset(suffix for suffix, name in _EXTENSIONS.items() if name in (*FORMATS, "MPO"))


def is_image_file(path: Path) -> bool:
    """Say whether a file's name is that of an image; hidden files are none."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
