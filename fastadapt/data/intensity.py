"""Choose which pixel values become black and white, from a setting and the training images.

A 12-bit camera writes 16-bit files; divided by 257, its 4,096 levels become 16. The setting says
which values become 0 and 255:

- ``dtype``: those that the file's type can hold;
- ``auto``: the range of 1, 8, 10, 12, 14 or 16 bits that holds the training images' values;
- ``LOW:HIGH``: two numbers;
- ``P%:Q%``: two percentiles over all values of all training images, each the smallest value that
  this share of all values does not exceed (NumPy's ``inverted_cdf``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from fastadapt.data.pixels import DeepImage, ValueRange, stored_values, type_name
from fastadapt.errors import InputError

BITS = (1, 8, 10, 12, 14, 16)
FORMS = "dtype, auto, LOW:HIGH (such as 0:4095) or P%:Q% (such as 0.5%:99.5%)"
LITTLE = 0.25  # share of a type's range; below it, dtype is warned about
BINS = 65536  # of values that are not integers of 16 bits
_LOWEST, _COUNT = -32768, 98304  # signed and unsigned 16-bit values in one table of counts
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*(%?)\s*:\s*({_NUMBER})\s*(%?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class IntensitySetting:
    """A setting of the intensity range, understood.

    Attributes:
        kind: ``"dtype"``, ``"auto"``, ``"values"`` or ``"percentiles"``.
        low, high: of the last two kinds.
    """

    kind: str
    low: float = 0.0
    high: float = 0.0

    @classmethod
    def parse(cls, text: str) -> IntensitySetting:
        """Understand one of the forms of the module's list.

        Raises:
            InputError: it is none of them, or LOW is not below HIGH.
        """
        if text in ("dtype", "auto"):
            return cls(text)
        match = _RANGE.fullmatch(text)
        if match is None or match[2] != match[4]:
            raise InputError(f"intensity_range is {text!r}; expected {FORMS}")
        low, high = float(match[1]), float(match[3])
        if not (low < high and math.isfinite(high - low)):
            raise InputError(f"intensity_range is {text!r}; expected LOW below HIGH")
        if match[2] and not 0 <= low < high <= 100:
            raise InputError(f"intensity_range is {text!r}; expected percentiles from 0% to 100%")
        return cls("percentiles" if match[2] else "values", low, high)


@dataclass
class ValueStatistics:
    """What is known of the values of some images, alpha left out.

    Attributes:
        low, high: the smallest and the largest value; infinities if there is none.
        types: in words, with the number of images of each.
        type_range: of the widest type; None once a type has none.
        wide: values are floating-point or beyond 16 bits, so that ``counts`` is not theirs.
        counts: [98304] how often each value from −32768 to 65535 occurs; None if not asked for.
    """

    low: float = math.inf
    high: float = -math.inf
    types: dict[str, int] = field(default_factory=dict)
    type_range: ValueRange | None = (0, 0)
    wide: bool = False
    counts: np.ndarray | None = None

    @classmethod
    def of(cls, image: Image.Image | DeepImage, with_counts: bool = False) -> ValueStatistics:
        """Measure an image."""
        values = stored_values(image)
        kind = values.dtype.kind
        low, high = (values.min(), values.max()) if values.size else (math.inf, -math.inf)
        try:
            own = (0, 255) if isinstance(image, Image.Image) else image.type_range("")
        except InputError:
            own = None
        wide = kind == "f" or bool(values.size and (low < _LOWEST or high >= _LOWEST + _COUNT))
        counts = None
        if with_counts and not wide:
            flat = values.astype(np.int32).reshape(-1) - _LOWEST
            counts = np.bincount(flat, minlength=_COUNT)
        return cls(float(low), float(high), {type_name(image): 1}, own, wide, counts)

    def add(self, other: ValueStatistics) -> None:
        """Take in the values of other images."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        for name, count in other.types.items():
            self.types[name] = self.types.get(name, 0) + count
        if self.type_range is None or other.type_range is None:
            self.type_range = None
        else:
            (a, b), (c, d) = self.type_range, other.type_range
            self.type_range = min(a, c), max(b, d)
        self.wide = self.wide or other.wide
        if other.counts is not None:
            self.counts = np.zeros(_COUNT, np.int64) if self.counts is None else self.counts
            self.counts += other.counts


def choose_range(
    setting: IntensitySetting,
    statistics: ValueStatistics,
    images: Callable[[], Iterable[Image.Image | DeepImage]],
) -> ValueRange | None:
    """Return the values that become 0 and 255; ``None`` for those of each file's type.

    Args:
        setting: what the user asked for.
        statistics: of the training images, with counts where the setting is percentiles.
        images: decodes the training images once more; called for percentiles of values that are
            floating-point or beyond 16 bits, which are found to 1/65536 of their range.

    Raises:
        InputError: the images do not have such a range.
    """
    if setting.kind == "dtype":
        return None
    if setting.kind == "values":
        return setting.low, setting.high
    if setting.kind == "auto":
        return _range_of_bits(statistics)
    shares = (setting.low, setting.high)
    if statistics.wide or statistics.counts is None:
        low, high = _percentiles_of_any(statistics.low, statistics.high, images, shares)
    else:
        low, high = (float(v + _LOWEST) for v in _percentiles(statistics.counts, shares))
    if not low < high:
        raise InputError(
            f"the {setting.low:g}% and {setting.high:g}% percentiles of the training images are "
            f"both {low:g}: give percentiles further apart, or LOW:HIGH"
        )
    return low, high


def warn_of_little_range(statistics: ValueStatistics) -> str | None:
    """Warn where the training images use less than a quarter of their type's range."""
    if statistics.type_range is None or not statistics.low <= statistics.high:
        return None
    low, high = statistics.type_range
    used = (statistics.high - (statistics.low if low < 0 else 0)) / (high - low)
    if used >= LITTLE:
        return None
    what = f"largest value is {statistics.high:g}"
    if low < 0:
        what = f"values go from {statistics.low:g} to {statistics.high:g}"
    return (
        f"warning: the training images' {what}, and they are divided as if values went from "
        f"{low:g} to {high:g} ({', '.join(statistics.types)}): {used:.1%} of that range are used, "
        "so that most levels of gray are lost. Set the intensity range to auto or LOW:HIGH."
    )


def _range_of_bits(statistics: ValueStatistics) -> ValueRange:
    """Return the range of fewest bits that holds all values; a signed one if some are negative."""
    if any("floating" in name for name in statistics.types):
        raise InputError(
            "`intensity_range=auto` is for integers, and the training images hold floating-point "
            "values: give LOW:HIGH, or percentiles such as 0.5%:99.5%"
        )
    signed = statistics.low < 0
    for bits in BITS:
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        if low <= statistics.low and statistics.high <= high:
            return float(low), float(high)
    raise InputError(
        f"`intensity_range=auto` knows up to 16 bits, and the training images hold values from "
        f"{statistics.low:g} to {statistics.high:g}: give LOW:HIGH"
    )


def _percentiles(counts: np.ndarray, shares: Iterable[float]) -> list[int]:
    """Return the indices of the smallest values that these shares (in %) do not exceed."""
    below = np.cumsum(counts)
    total = int(below[-1])
    return [int(np.searchsorted(below, max(math.ceil(total * s / 100), 1))) for s in shares]


def _percentiles_of_any(
    low: float,
    high: float,
    images: Callable[[], Iterable[Image.Image | DeepImage]],
    shares: tuple[float, float],
) -> tuple[float, float]:
    """Return percentiles of values of any type, by counts in bins between the extremes."""
    if not low < high:
        return low, high
    counts = np.zeros(BINS, np.int64)
    for image in images():
        counts += np.histogram(stored_values(image), bins=BINS, range=(low, high))[0]
    first, last = _percentiles(counts, shares)
    width = (high - low) / BINS
    # A percentile is known to lie in a bin: the range takes in the whole of both.
    return low + first * width, low + (last + 1) * width
