"""Decode every image of a data set once, before anything is trained on it.

One pass finds what a training must know beforehand: files that cannot be read, what of others is
dropped, files that are there twice, and the values of the training images, from which the
intensity range follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

from PIL import Image

from fastadapt.data.dataset import Dataset, Sample
from fastadapt.data.decode import decode
from fastadapt.data.decode_pool import INLINE, DecodePool, Job
from fastadapt.data.facts import ImageFacts, look_at
from fastadapt.data.intensity import (
    IntensitySetting,
    ValueStatistics,
    choose_range,
    warn_of_little_range,
)
from fastadapt.data.memory import available_memory
from fastadapt.data.pixels import EIGHT_BITS, DeepImage, ValueRange
from fastadapt.data.splits import SPLITS
from fastadapt.errors import InputError, counted, first_few, form
from fastadapt.processes import ALONE, Place, Processes
from fastadapt.progress import prefetch

KEPT_SHARE = 0.2  # of the free memory that decoded images may take until their size is known


@dataclass(frozen=True)
class Scanned:
    """A data set whose images were all decoded.

    Attributes:
        dataset: less the images that cannot be read.
        value_range: see :class:`fastadapt.data.preprocess.Preprocess`.
        lines: for the terminal: what was found, left out and dropped, and warnings.
        copies: paths of images with the same bytes, together.
    """

    dataset: Dataset
    value_range: ValueRange | None
    lines: list[str] = field(default_factory=list)
    copies: list[list[Path]] = field(default_factory=list)


class Scan:
    """A look at every image of a data set, begun at once and in processes.

    What was decoded is kept, as far as the memory allows, for the resizing that follows. Use it as
    a context manager: the processes end with the context.

    Args:
        dataset: whose images to decode.
        workers: processes that decode; a small data set is decoded by this one.
        intensity_range: see :mod:`fastadapt.data.intensity`.
        place: of this process among those that train together, each of which looks at its share.
        keep: whether decoded images wait to be resized; a GPU decodes its own.

    Attributes:
        dataset: as given.
        pool: the processes; ``None`` for a small data set.

    Raises:
        InputError: ``intensity_range`` cannot be.
    """

    def __init__(
        self,
        dataset: Dataset,
        workers: int,
        intensity_range: str = "dtype",
        place: Place = ALONE.place,
        keep: bool = True,
    ):
        self.dataset = dataset
        self.pool: DecodePool | None = None
        self._workers = max(workers, 1)
        self._given = intensity_range
        self._setting = IntensitySetting.parse(intensity_range)
        self._job: Job | None = None
        self._mine: list[int] = []  # samples that this process looks at
        samples = dataset.samples
        if len(samples) > INLINE:
            # A small data set is looked at by each process as a whole, others in shares.
            self._mine = [i for i, s in enumerate(samples) if place.owns(str(s.path))]
            share = len(samples) // place.size
            self.pool = DecodePool(max(min(self._workers, share // 8), 1))
            own = [samples[i] for i in self._mine]
            looks = [(str(s.path), self._setting, s.split == "train") for s in own]
            kept = int(KEPT_SHARE * available_memory()) // place.local_size if keep else 0
            self._job = self.pool.look(looks, kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.close()

    def _facts(
        self, advance: Callable[[int], object], processes: Processes
    ) -> Sequence[ImageFacts]:
        if self._job is not None:
            shares = processes.gather(list(zip(self._mine, self._job.wait(advance), strict=True)))
            by_place = dict(pair for share in shares for pair in share)
            return [by_place[i] for i in range(len(self.dataset.samples))]
        found = []
        for sample in self.dataset.samples:
            found.append(look_at(sample.path, self._setting, sample.split == "train")[0])
            advance(1)
        return found

    def wait(
        self,
        *,
        skip_unreadable: bool = False,
        advance: Callable[[int], object] = lambda count: None,
        processes: Processes = ALONE,
    ) -> Scanned:
        """Wait for all images; decide how their values are scaled.

        Args:
            skip_unreadable: leave out images that cannot be read instead of refusing the data set.
            advance: called with the number of images that were decoded, for a progress bar.
            processes: that train together; each looks at its share.

        Raises:
            InputError: an image cannot be read, nor left out; the same bytes stand under two
                labels; the training images have no range as asked for.
        """
        facts = self._facts(advance, processes)
        found = [_Found(s, f) for s, f in zip(self.dataset.samples, facts, strict=True)]
        statistics = ValueStatistics()
        for item in found:
            if item.sample.split == "train" and not item.facts.problem:
                statistics.add(item.facts.statistics)
        return _scanned(
            self.dataset, found, statistics, self._given, self._workers, skip_unreadable
        )


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
        workers: processes that decode.
        intensity_range: see :mod:`fastadapt.data.intensity`.
        skip_unreadable: leave out images that cannot be read instead of refusing the data set.
        on_image: called after every image, for a progress bar.

    Raises:
        InputError: as :meth:`Scan.wait`.
    """

    def advance(count: int) -> None:
        if on_image is not None:
            for _ in range(count):
                on_image()

    with Scan(dataset, workers, intensity_range) as begun:
        return begun.wait(skip_unreadable=skip_unreadable, advance=advance)


class _Found(NamedTuple):
    sample: Sample
    facts: ImageFacts


def _scanned(
    dataset: Dataset,
    found: list[_Found],
    statistics: ValueStatistics,
    intensity_range: str,
    workers: int,
    skip_unreadable: bool,
) -> Scanned:
    setting = IntensitySetting.parse(intensity_range)
    lines: list[str] = []
    bad = [item for item in found if item.facts.problem]
    if bad:
        total = f"{len(bad)} of {counted(len(found), 'image')} cannot be read"
        reasons = first_few((item.facts.problem for item in bad), 2)
        if not skip_unreadable:
            raise InputError(
                f"{total}: {reasons}. Repair or remove them, or leave them out with "
                "`skip_unreadable=True`."
            )
        lines.append(f"left out: {total}: {reasons}")
        dataset = dataset.without(item.sample.path for item in bad)
    read = [item for item in found if not item.facts.problem]
    lines += dropped_lines({item.sample.path: item.facts.dropped for item in read})
    copies = _copies(read)
    dataset, said = _without_copies(dataset, copies)
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
    paths = [[sample.path for sample in group] for group in copies]
    return Scanned(dataset, value_range, lines, paths)


def dropped_lines(dropped: dict[Path, tuple[str, ...]]) -> list[str]:
    """Say in lines for the terminal what of images is not read, by kind."""
    by_kind: dict[str, list[Path]] = {}
    for path, kinds in dropped.items():
        for kind in kinds:
            by_kind.setdefault(kind, []).append(path)
    return [
        f"warning: {len(paths)} of {counted(len(dropped), 'image')} "
        f"{form(len(paths), 'loses', 'lose')} {kind} (first {paths[0]})"
        for kind, paths in by_kind.items()
    ]


def _copies(read: list[_Found]) -> list[list[Sample]]:
    """Group images that have the same bytes."""
    groups: dict[bytes, list[Sample]] = {}
    for item in read:
        groups.setdefault(item.facts.digest, []).append(item.sample)
    return [group for group in groups.values() if len(group) > 1]


def _without_copies(dataset: Dataset, copies: list[list[Sample]]) -> tuple[Dataset, list[str]]:
    """Look at images with the same bytes in two places.

    Under two labels they are refused. In two splits they are warned of, unless validation was
    drawn here: then they go back to training, with the images of their groups.
    """
    contrary = [group for group in copies if len({sample.label for sample in group}) > 1]
    if contrary:
        one, other = contrary[0][0], next(s for s in contrary[0] if s.label != contrary[0][0].label)
        raise InputError(
            f"{counted(len(contrary), 'image')} {form(len(contrary), 'stands', 'stand')} under "
            f"two labels with the same bytes: {one.path} is "
            f"{dataset.classes[one.label]!r}, {other.path} is {dataset.classes[other.label]!r}. "
            "Keep each image under one label."
        )
    lines: list[str] = []
    mixed = [group for group in copies if len({sample.split for sample in group}) > 1]
    if not mixed:
        return dataset, lines
    if dataset.val_drawn:
        back = {s.path for group in mixed for s in group if s.split == "val"}
        torn = {s.group for s in dataset.split("val") if s.path in back and s.group}
        back |= {s.path for s in dataset.split("val") if s.group in torn}
        kept = [s for s in dataset.samples if s.split == "val" and s.path not in back]
        mixed = [g for g in mixed if any(s.split == "test" for s in g)] if kept else mixed
        if kept:
            samples = tuple(
                replace(s, split="train") if s.path in back else s for s in dataset.samples
            )
            dataset = replace(dataset, samples=samples)
            lines.append(
                f"{counted(len(back), 'image')} drawn for validation "
                f"{form(len(back), 'trains', 'train')} instead, since training has the "
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
    kinds = Counter(item.facts.type_name for item in read)
    if kinds[EIGHT_BITS] and (low < 0 or high > 255):
        listed = ", ".join(f"{count} {name}" for name, count in kinds.items())
        raise InputError(
            f"the images are of different kinds ({listed}), for which no one range of values "
            f"({low:g}:{high:g}) is right: give `intensity_range=dtype`, or images of one kind"
        )
