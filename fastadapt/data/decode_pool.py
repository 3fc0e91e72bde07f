"""Decode images with all cores, in processes, into memory that they share with this one.

Threads that decode hold Python's lock in turn, and a thread that launches GPU work waits for it at
each of its thousands of calls. Processes don't, and are started before PyTorch is imported: by the
time the model is there, the images of a small data set are decoded.

The memory is an anonymous file, which goes with the last process that has it; nothing is left over
after a kill. :mod:`fastadapt.data.decode_process` has what is asked of one of the processes.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastadapt.data.decode_process import DecodeProcess, Part
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError
from fastadapt.processes import place_from_environment

if TYPE_CHECKING:
    from fastadapt.data.intensity import IntensitySetting
    from fastadapt.data.pixels import ValueRange

INLINE = 128  # images that are decoded sooner than processes start
# As many images go to a process at once: few messages, and still an even share.
CHUNK = 16
JPEG_BYTES = 256 * 2**10  # of a JPEG file that processes hand over; larger ones are read again


@dataclass(frozen=True)
class JpegFile:
    """A JPEG file that is left to a GPU.

    Attributes:
        size: bytes of the file.
        pixels: of the image.
        sent: whether the bytes are where the image's pixels would be.
    """

    size: int
    pixels: int
    sent: bool


# Of an image that is stored: None, what of the file is dropped, or why it cannot be read; or what
# else is there than its pixels.
Answer = str | tuple[str, ...] | JpegFile | None


class Reading(NamedTuple):
    """How an image becomes the pixels that are kept: its values' range, then its size.

    Attributes:
        geometry: height, width, and how they are reached.
        value_range: the values that become 0 and 255; ``None`` for the range of the file's type.
        jpegs: whether JPEG files are left to a GPU (:mod:`fastadapt.data.gpu_decode`).
    """

    geometry: Geometry
    value_range: ValueRange | None = None
    jpegs: bool = False

    @property
    def slot(self) -> int:
        """The bytes of memory that an image needs."""
        pixels = self.geometry.height * self.geometry.width * 3
        return max(pixels, JPEG_BYTES) if self.jpegs else pixels


class Region(NamedTuple):
    """Shared memory for images of one size: where it starts, bytes of an image, all bytes.

    ``file`` is where other processes open it, if it is not in the pool's own memory.
    """

    start: int
    size: int
    bytes: memoryview
    file: str | None = None

    def place(self, index: int) -> int:
        """Return where an image starts."""
        return self.start + index * self.size


class DecodePool:
    """Processes that decode images.

    Use it as a context manager, or call :meth:`close`; it is closed with the program in any case.

    Args:
        workers: number of processes.
    """

    def __init__(self, workers: int):
        self._memory_fd = _anonymous_file()
        self._allocated = 0  # bytes of the memory
        self._owner: dict[str, int] = {}  # which process holds an image since a check
        self._workers: list[DecodeProcess] = []
        for number in range(max(workers, 1)):
            self._workers.append(DecodeProcess(number, self._memory_fd))

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes. Memory that was handed out stays until nothing refers to it."""
        for process in self._workers:
            process.stop()
        for process in self._workers:
            process.join()
        if self._memory_fd >= 0:
            os.close(self._memory_fd)
        self._workers, self._memory_fd = [], -1

    def __del__(self):
        with suppress(Exception):
            self.close()

    @property
    def workers(self) -> int:
        """The number of processes.

        Raises:
            InputError: they were ended.
        """
        if not self._workers:
            raise InputError("the processes that decode images were closed: open others")
        return len(self._workers)

    @property
    def pids(self) -> list[int]:
        """The process ids."""
        return [process.pid for process in self._workers]

    def look(self, images: Sequence[tuple[str, IntensitySetting, bool]], keep: int = 0) -> Job:
        """Start to look at every image (:func:`fastadapt.data.facts.look_at`).

        Args:
            images: what that function takes: path, setting, whether values are counted.
            keep: bytes of decoded images that all processes together may hold for :meth:`store`.
        """
        paths = [path for path, _, _ in images]
        for index, path in enumerate(paths):
            self._owner[path] = index % self.workers

        def request(rows: list[int]) -> tuple:
            return ("look", keep // self.workers, [images[i] for i in rows])

        return Job(self, self._parts(paths, CHUNK * self.workers), request, depth=8)

    def memory(self, count: int, size: int) -> Region:
        """Return new shared memory for ``count`` images of ``size`` bytes (:attr:`Reading.slot`).

        Raises:
            OSError: there is not as much memory.
        """
        start, length = self._allocated, max(count * size, 1)
        os.posix_fallocate(self._memory_fd, start, length)
        self._allocated += -(-length // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._memory_fd, length, offset=start)
        return Region(start, size, memoryview(mapped)[: count * size])

    def store(
        self,
        paths: Sequence[str],
        reading: Reading,
        region: Region,
        places: Sequence[int] | None = None,
    ) -> Job:
        """Start to decode images into the region, image i into place i, or into ``places[i]``.

        The job's answers are of the type :data:`Answer`.
        """
        placed = list(zip(range(len(paths)) if places is None else places, paths, strict=True))
        request = partial(_request_to_store, reading, region, placed)
        return Job(self, self._parts(paths, CHUNK * self.workers), request, depth=8)

    def stream(
        self,
        batches: Iterable[Sequence[tuple[int, str]]],
        reading: Reading,
        region: Region,
        ahead: int,
    ) -> Iterator[list[Answer]]:
        """Decode batches in order, up to ``ahead`` of them before they are asked for.

        Args:
            batches: for each, the place in the region and the path of its images. The places of
                the last batch that was yielded are free once the next is asked for.
            reading: what is done to each.
            region: where they are put.
            ahead: number of batches that are in work or waiting.

        Yields:
            An answer for each image of a batch, once the batch is there.
        """
        waiting: deque[Part] = deque()
        for batch in batches:
            if len(waiting) == ahead:
                yield self.collect(waiting.popleft())
            shares: dict[int, list[int]] = {}
            for index in range(len(batch)):
                shares.setdefault(index % self.workers, []).append(index)
            part = Part(shares)
            self.send(part, partial(_request_to_store, reading, region, batch))
            waiting.append(part)
        while waiting:
            yield self.collect(waiting.popleft())

    def _parts(self, paths: Sequence[str], size: int) -> Iterator[Part]:
        for start in range(0, len(paths), size):
            shares: dict[int, list[int]] = {}
            for index in range(start, min(start + size, len(paths))):
                worker = self._owner.get(paths[index], index % self.workers)
                shares.setdefault(worker, []).append(index)
            yield Part(shares)

    def send(self, part: Part, request: Callable[[list[int]], tuple]) -> None:
        """Send every process its share of a part."""
        for worker, rows in part.shares.items():
            self._workers[worker].ask(part, request(rows))

    def collect(self, part: Part) -> list[Any]:
        """Wait for the answers to a part; return them in the order of its images.

        Answers to others come first, of a pass that nobody went on with or of another one.
        """
        for worker in part.shares:
            self._workers[worker].wait_for(part)
        return [part.answers[index] for index in sorted(part.answers)]


def _request_to_store(
    reading: Reading, region: Region, placed: Sequence[tuple[int, str]], rows: list[int]
) -> tuple:
    """Return the request to decode some of the images, each into its place of the region."""
    chosen = [(region.place(placed[row][0]), placed[row][1]) for row in rows]
    return ("store", reading, chosen, region.file)


class Job:
    """Images that are being decoded. Some are sent at once, the rest while :meth:`wait` waits."""

    def __init__(
        self,
        pool: DecodePool,
        parts: Iterator[Part],
        request: Callable[[list[int]], tuple],
        depth: int,
    ):
        self._decode_pool, self._parts, self._request = pool, parts, request
        self._sent: deque[Part] = deque()
        for _ in range(depth):
            self._send_next()

    def _send_next(self) -> None:
        part = next(self._parts, None)
        if part is not None:
            self._decode_pool.send(part, self._request)
            self._sent.append(part)

    def wait(self, advance: Callable[[int], object] | None = None) -> list[Any]:
        """Wait for all images; return their answers, in order.

        Args:
            advance: called with the number of images of each part that is done.
        """
        answers = []
        while self._sent:
            part = self._sent.popleft()
            answers += self._decode_pool.collect(part)
            self._send_next()
            if advance is not None:
                advance(part.images)
        return answers


def default_workers() -> int:
    """Return the number of processes that decode: one for each core that this one may use.

    Processes of a job that torchrun started share the cores of their machine.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(cores // place_from_environment().local_size, 1)


def open_region(file: str, count: int, geometry: Geometry) -> Region:
    """Map memory for images that several programs share, ``/proc/…/fd/…`` of the one that has it.

    Raises:
        OSError: the file is gone, or there is not as much memory.
    """
    size = geometry.height * geometry.width * 3
    handle = os.open(file, os.O_RDWR)
    try:
        os.posix_fallocate(handle, 0, max(count * size, 1))
        mapped = mmap.mmap(handle, max(count * size, 1))
    finally:
        os.close(handle)
    return Region(0, size, memoryview(mapped)[: count * size], file)


@contextmanager
def shared_file() -> Iterator[str | None]:
    """Give a file in memory that other programs can open; ``None`` where there are none."""
    if not hasattr(os, "memfd_create"):
        yield None
        return
    handle = os.memfd_create("fastadapt images of several processes", 0)
    try:
        yield f"/proc/{os.getpid()}/fd/{handle}"
    finally:
        os.close(handle)


def _anonymous_file() -> int:
    """Return a file in memory without a name, or on disk where the system has no such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fastadapt images", 0)
    handle, name = tempfile.mkstemp()
    Path(name).unlink()
    return handle
