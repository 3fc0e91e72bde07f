"""Decode every image of a data set once, before anything is trained on it.

One pass finds what a training must know beforehand: files that cannot be read, what of others is
dropped, files that are there twice, and the values of the training images, from which the
intensity range follows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from fastadapt.data.dataset import Dataset, Sample
from fastadapt.data.decode import Decoded, decode
from fastadapt.data.intensity import (
    IntensitySetting,
    ValueStatistics,
    choose_range,
    warn_of_little_range,
)
from fastadapt.data.pixels import (
    EIGHT_BITS,
    DeepImage,
    ValueRange,
    check_values,
    range_for,
    type_name,
)
from fastadapt.data.splits import SPLITS
from fastadapt.errors import InputError, first_few
from fastadapt.progress import prefetch


@dataclass(frozen=True)
class Scanned:
    """A data set whose images were all decoded.

    Attributes:
        dataset: less the images that cannot be read.
        value_range: see :class:`fastadapt.data.preprocess.Preprocess`.
        lines: for the terminal: what was found, left out and dropped, and warnings.
    """

    dataset: Dataset
    value_range: ValueRange | None
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Found:
    """What one image's decoding gave; ``problem`` alone if it failed."""

    sample: Sample
    problem: str = ""
    type_name: str = ""
    digest: bytes = b""
    dropped: tuple[str, ...] = ()
    statistics: ValueStatistics = field(default_factory=ValueStatistics)


def scan(
    dataset: Dataset,
    workers: int,
    intensity_range: str = "dtype",
    *,
    skip_unreadable: bool = False,
    on_image: Callable[[], None] | None = None,
) -> Scanned:
    """Decode every image of a data set, and decide how its values are scaled.

    Args:
        dataset: whose images to decode.
        workers: threads that decode.
        intensity_range: see :mod:`fastadapt.data.intensity`.
        skip_unreadable: leave out images that cannot be read instead of refusing the data set.
        on_image: called after every image, for a progress bar.

    Raises:
        InputError: an image cannot be read, nor left out; the same bytes stand under two labels;
            the training images have no range as asked for.
    """
    setting = IntensitySetting.parse(intensity_range)
    given = (setting.low, setting.high) if setting.kind == "values" else None

    def look(sample: Sample) -> _Found:
        try:
            decoded = decode(sample.path)
            check_values(decoded.image, str(sample.path))
            if setting.kind in ("dtype", "values"):  # others are found from the images
                range_for(decoded.image, given, str(sample.path))
        except InputError as error:
            return _Found(sample, str(error))
        return _of_decoded(sample, decoded, setting.kind == "percentiles")

    found = []
    statistics = ValueStatistics()
    for result in prefetch(look, dataset.samples, workers, ahead=4 * workers):
        if result.sample.split == "train" and not result.problem:
            statistics.add(result.statistics)
        found.append(replace(result, statistics=ValueStatistics()))  # counts take memory
        if on_image:
            on_image()

    lines: list[str] = []
    bad = [item for item in found if item.problem]
    if bad:
        total = f"{len(bad)} of {len(found)} images cannot be read"
        reasons = first_few((item.problem for item in bad), 2)
        if not skip_unreadable:
            raise InputError(
                f"{total}: {reasons}. Repair or remove them, or leave them out with "
                "`skip_unreadable=True`."
            )
        lines.append(f"left out: {total}: {reasons}")
        dataset = dataset.without(item.sample.path for item in bad)
    read = [item for item in found if not item.problem]
    lines += dropped_lines({item.sample.path: item.dropped for item in read})
    dataset, said = _without_copies(dataset, read)
    lines += said

    def again() -> Iterator[Image.Image | DeepImage]:
        paths = [sample.path for sample in dataset.split("train")]
        for decoded in prefetch(decode, paths, workers, ahead=4 * workers):
            yield decoded.image

    value_range = choose_range(setting, statistics, again)
    if setting.kind == "dtype":
        warning = warn_of_little_range(statistics)
        lines += [warning] if warning else []
    elif value_range is not None:
        _check_kinds(value_range, read)
        low, high = value_range
        lines.append(f"intensity range: {low:g} becomes black, {high:g} white ({intensity_range})")
    return Scanned(dataset, value_range, lines)


def dropped_lines(dropped: dict[Path, tuple[str, ...]]) -> list[str]:
    """Say in lines for the terminal what of images is not read, by kind."""
    by_kind: dict[str, list[Path]] = {}
    for path, kinds in dropped.items():
        for kind in kinds:
            by_kind.setdefault(kind, []).append(path)
    return [
        f"warning: {len(paths)} of {len(dropped)} images lose {kind} (first {paths[0]})"
        for kind, paths in by_kind.items()
    ]


def _of_decoded(sample: Sample, decoded: Decoded, with_counts: bool) -> _Found:
    with sample.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    statistics = ValueStatistics()
    if sample.split == "train":
        statistics = ValueStatistics.of(decoded.image, with_counts)
    return _Found(sample, "", type_name(decoded.image), digest, decoded.dropped, statistics)


def _without_copies(dataset: Dataset, read: list[_Found]) -> tuple[Dataset, list[str]]:
    """Look for the same bytes in two places.

    Under two labels they are refused. In two splits they are warned of, unless validation was
    drawn here: then they go back to training.
    """
    groups: dict[bytes, list[Sample]] = {}
    for item in read:
        groups.setdefault(item.digest, []).append(item.sample)
    copies = [group for group in groups.values() if len(group) > 1]
    contrary = [group for group in copies if len({sample.label for sample in group}) > 1]
    if contrary:
        one, other = contrary[0][0], next(s for s in contrary[0] if s.label != contrary[0][0].label)
        raise InputError(
            f"{len(contrary)} images stand under two labels with the same bytes: {one.path} is "
            f"{dataset.classes[one.label]!r}, {other.path} is {dataset.classes[other.label]!r}. "
            "Keep each image under one label."
        )
    lines: list[str] = []
    mixed = [group for group in copies if len({sample.split for sample in group}) > 1]
    if not mixed:
        return dataset, lines
    if dataset.val_drawn:
        back = {s.path for group in mixed for s in group if s.split == "val"}
        kept = [s for s in dataset.samples if s.split == "val" and s.path not in back]
        mixed = [g for g in mixed if any(s.split == "test" for s in g)] if kept else mixed
        if kept:
            samples = tuple(
                replace(s, split="train") if s.path in back else s for s in dataset.samples
            )
            dataset = replace(dataset, samples=samples)
            lines.append(
                f"{len(back)} images drawn for validation train instead, since training has the "
                f"same bytes (first {min(back)})"
            )
    for split in SPLITS[1:]:
        shared = [g for g in mixed if {"train", split} <= {s.split for s in g}]
        if shared:
            path = next(s.path for s in shared[0] if s.split == split)
            lines.append(
                f"warning: {sum(s.split == split for g in shared for s in g)} of "
                f"{len(dataset.split(split))} {split} images have the same bytes as training "
                f"images (first {path}): their {split} score says nothing of new images"
            )
    if any({"val", "test"} <= {s.split for s in g} for g in mixed):
        lines.append("warning: images of val and of test have the same bytes")
    return dataset, lines


def _check_kinds(value_range: ValueRange, read: list[_Found]) -> None:
    """Refuse a range of deep images where some images have 8 bits."""
    low, high = value_range
    kinds = Counter(item.type_name for item in read)
    if kinds[EIGHT_BITS] and (low < 0 or high > 255):
        listed = ", ".join(f"{count} {name}" for name, count in kinds.items())
        raise InputError(
            f"the images are of different kinds ({listed}), for which no one range of values "
            f"({low:g}:{high:g}) is right: give `intensity_range=dtype`, or images of one kind"
        )
