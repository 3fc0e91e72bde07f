"""Look at an image once: can it be read, what of it is dropped, which values does it hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fastadapt.data.decode import decode
from fastadapt.data.intensity import IntensitySetting, ValueStatistics
from fastadapt.data.pixels import DeepImage, check_values, range_for, type_name
from fastadapt.errors import InputError


@dataclass(frozen=True)
class ImageFacts:
    """What decoding an image gave.

    Attributes:
        problem: why it cannot be read; empty if it can.
        type_name: of its values, in words.
        digest: SHA-256 of the file.
        dropped: what of it is not read, in words.
        statistics: of its values; empty if nobody asked for them.
    """

    problem: str = ""
    type_name: str = ""
    digest: bytes = b""
    dropped: tuple[str, ...] = ()
    statistics: ValueStatistics = field(default_factory=ValueStatistics)


def look_at(
    path: Path, setting: IntensitySetting, with_statistics: bool
) -> tuple[ImageFacts, Image.Image | DeepImage | None]:
    """Decode an image and return what there is to know of it, and the decoded image.

    Args:
        path: of the image.
        setting: how values are scaled; a range that does not fit the image is a problem.
        with_statistics: whether its values decide the range (training images).
    """
    given = (setting.low, setting.high) if setting.kind == "values" else None
    try:
        decoded = decode(path)
        check_values(decoded.image, str(path))
        if setting.kind in ("dtype", "values"):  # others are found from the images
            range_for(decoded.image, given, str(path))
    except InputError as error:
        return ImageFacts(str(error)), None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    statistics = ValueStatistics()
    if with_statistics:
        statistics = ValueStatistics.of(decoded.image, setting.kind == "percentiles")
    facts = ImageFacts("", type_name(decoded.image), digest, decoded.dropped, statistics)
    return facts, decoded.image
