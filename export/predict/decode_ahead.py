"""Decode batches of images while the batches before them are computed, in bounded memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastadapt.data.decode import load_and_tell, read_or_say
from fastadapt.data.decode_pool import DecodePool, Reading
from fastadapt.data.decode_ring import AHEAD, DecodeRing
from fastadapt.data.pixels import ValueRange
from fastadapt.progress import prefetch

if TYPE_CHECKING:
    from fastadapt.data.gpu_decode import GpuDecoder

HELD_BYTES = 128 * 2**20  # of decoded images of their own sizes that wait for a batch

# Images of one size: their places in the batch, and uint8 [images, H, W, 3].
Group = tuple[list[int], np.ndarray]


@dataclass
class DecodedBatch:
    """One batch of images, as decoded.

    Attributes:
        groups: images of one size each; to be used up before the next batch is asked for, which
            overwrites them.
        problems: why an image cannot be read, by its place; complete once ``groups`` is used up.
        dropped: what of an image's file is not read, by its place; as complete.
    """

    groups: Iterable[Group]
    problems: dict[int, str] = field(default_factory=dict)
    dropped: dict[int, tuple[str, ...]] = field(default_factory=dict)


# From batches of paths to decoded batches, in order.
Decoder = Callable[[Iterable[Sequence[str]]], Iterator[DecodedBatch]]


def open_decoder(
    reading: Reading | None, value_range: ValueRange | None, batch: int, workers: int
) -> AbstractContextManager[Decoder]:
    """Return a context whose value decodes batches ahead.

    Args:
        reading: how images become pixels of one size; ``None`` to leave each its own size.
        value_range: of the pixels, for images of their own size.
        batch: most images of a batch.
        workers: processes that decode, or threads for images of their own size.
    """
    if reading is None:
        return nullcontext(lambda batches: _own_sizes(batches, value_range, workers))
    return PoolDecoder(reading, batch, workers)


def images_ahead(batch: int, workers: int) -> int:
    """Return how many images a decoder may ask for before it gives the first batch."""
    return max((AHEAD + 1) * batch, 2 * workers + 1 + batch)


class PoolDecoder:
    """Decode in processes, into a ring of shared memory.

    Args:
        reading: how images become pixels of one size.
        batch: most images of a batch.
        workers: processes.
        gpu: decodes JPEG files, if given.
    """

    def __init__(self, reading: Reading, batch: int, workers: int, gpu: GpuDecoder | None = None):
        self.reading = reading if gpu is None else gpu.reading
        self.batch, self._gpu = batch, gpu
        self.pool = DecodePool(workers)
        self._ring: DecodeRing | None = None

    def __enter__(self) -> Decoder:
        return self._decode

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def _decode(self, batches: Iterable[Sequence[str]]) -> Iterator[DecodedBatch]:
        if self._ring is None:
            self._ring = DecodeRing(self.pool, self.reading, self.batch)
        for decoded in self._ring.batches(batches):
            if self._gpu is None:
                pixels, answers = self._ring.pixels(decoded), decoded.answers
            else:
                finished, answers = self._gpu(decoded)
                pixels = finished.cpu().numpy()
            problems = {i: answer for i, answer in enumerate(answers) if isinstance(answer, str)}
            dropped = {i: answer for i, answer in enumerate(answers) if isinstance(answer, tuple)}
            rows = [i for i in range(len(answers)) if i not in problems]
            if problems:
                pixels = pixels[rows]
            yield DecodedBatch([(rows, pixels)] if rows else [], problems, dropped)


def _own_sizes(
    batches: Iterable[Sequence[str]], value_range: ValueRange | None, workers: int
) -> Iterator[DecodedBatch]:
    """Decode in threads, a few images ahead, whatever their sizes."""
    counts: deque[int] = deque()

    def paths() -> Iterator[str]:
        for batch in batches:
            counts.append(len(batch))
            yield from batch

    def read(path: str) -> tuple[np.ndarray, tuple[str, ...]]:
        image, dropped = load_and_tell(path, value_range)
        return np.asarray(image), dropped

    images = prefetch(partial(read_or_say, read), paths(), workers, 2 * workers)
    for first in images:
        decoded = DecodedBatch(())
        batch = itertools.islice(itertools.chain([first], images), counts.popleft())
        decoded.groups = _by_size(batch, decoded)
        yield decoded


def _by_size(
    images: Iterator[tuple[np.ndarray, tuple[str, ...]] | str], batch: DecodedBatch
) -> Iterator[Group]:
    """Group images by size, and give the groups whenever they hold much memory."""
    held: dict[Any, list[tuple[int, np.ndarray]]] = {}
    size = 0
    for place, found in enumerate(images):
        if isinstance(found, str):
            batch.problems[place] = found
            continue
        image, dropped = found
        if dropped:
            batch.dropped[place] = dropped
        held.setdefault(image.shape, []).append((place, image))
        size += image.nbytes
        if size >= HELD_BYTES:
            yield from _stacked(held)
            size = 0
    yield from _stacked(held)


def _stacked(held: dict[Any, list[tuple[int, np.ndarray]]]) -> Iterator[Group]:
    while held:
        _, images = held.popitem()
        yield [place for place, _ in images], np.stack([pixels for _, pixels in images])


@dataclass(frozen=True)
class Computed:
    """A model's outputs for one batch.

    Attributes:
        rows: places in the batch of the images that could be read, ascending.
        values: fp32 [rows, outputs].
        problems: why the others cannot be read, by place.
        dropped: what of an image's file is not read, by place.
    """

    rows: list[int]
    values: np.ndarray
    problems: dict[int, str]
    dropped: dict[int, tuple[str, ...]] = field(default_factory=dict)


def compute(batch: DecodedBatch, run: Callable[[np.ndarray], np.ndarray], width: int) -> Computed:
    """Run a model on a decoded batch.

    Args:
        batch: of images.
        run: from uint8 [images, H, W, 3] to [images, outputs].
        width: outputs of the model.
    """
    rows: list[int] = []
    parts: list[np.ndarray] = [np.empty((0, width), np.float32)]
    for places, pixels in batch.groups:
        rows += places
        parts.append(np.asarray(run(pixels), np.float32))
    order = np.argsort(np.array(rows, dtype=np.int64))
    values = np.concatenate(parts)[order]
    return Computed([rows[i] for i in order], values, batch.problems, batch.dropped)
