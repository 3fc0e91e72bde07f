"""Decode batches ahead of their use, in a ring of memory that is shared with the processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastadapt.data.decode_pool import Answer, DecodePool, Reading

AHEAD = 4  # batches that are in work, waiting or being used


class RingBatch(NamedTuple):
    """A batch of images, as processes decoded them.

    Attributes:
        paths: of the images.
        answers: of the processes.
        slots: uint8 [images, bytes], where pixels or JPEG files are; overwritten once the next
            batch is asked for.
    """

    paths: Sequence[str]
    answers: list[Answer]
    slots: np.ndarray


class DecodeRing:
    """Memory for the batches that are ahead, and what fills it; the same for each pass.

    Args:
        pool: processes that decode.
        reading: how images become pixels of one size.
        batch: most images of a batch.
    """

    def __init__(self, pool: DecodePool, reading: Reading, batch: int):
        self.reading, self._decode_pool, self._batch = reading, pool, batch
        self._region = pool.memory(AHEAD * batch, reading.slot)
        memory = np.frombuffer(self._region.bytes, np.uint8)
        self.slots = memory.reshape(AHEAD * batch, reading.slot)

    def batches(self, batches: Iterable[Sequence[str]]) -> Iterator[RingBatch]:
        """Decode batches of paths in order."""
        sent: deque[Sequence[str]] = deque()

        def requests() -> Iterator[list[tuple[int, str]]]:
            for number, paths in enumerate(batches):
                first = number % AHEAD * self._batch
                sent.append(paths)
                yield [(first + i, path) for i, path in enumerate(paths)]

        decoded = self._decode_pool.stream(requests(), self.reading, self._region, AHEAD)
        for number, answers in enumerate(decoded):
            first = number % AHEAD * self._batch
            yield RingBatch(sent.popleft(), answers, self.slots[first : first + len(answers)])

    def pixels(self, batch: RingBatch) -> np.ndarray:
        """Return a batch as uint8 [images, H, W, 3]; images that cannot be read are left over."""
        return pixels_of(self.reading, batch.slots)


def pixels_of(reading: Reading, slots: np.ndarray) -> np.ndarray:
    """Return slots in which there are pixels as uint8 [images, H, W, 3]."""
    height, width = reading.geometry.height, reading.geometry.width
    return slots[:, : height * width * 3].reshape(len(slots), height, width, 3)
