"""Decode images in a process of its own: the other end of :mod:`fastadapt.data.decode_pool`.

The process imports Pillow and NumPy and not PyTorch, so that it is ready in a fraction of a second.
It ends when its connection does, whatever became of the process at the other end.
"""

from __future__ import annotations

import mmap
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image

from fastadapt.data.decode import load_and_tell
from fastadapt.data.decode_pool import Answer, JpegFile, Reading
from fastadapt.data.facts import ImageFacts, look_at
from fastadapt.data.intensity import IntensitySetting
from fastadapt.data.pixels import DeepImage, to_eight_bit_rgb
from fastadapt.data.plain_jpeg import read_plain_jpeg
from fastadapt.errors import InputError


def main(connection_fd: int, memory_fd: int) -> None:
    """Serve requests until the connection ends.

    A request is ``("look", keep, images)``, answered with a list of facts
    (:func:`fastadapt.data.facts.look_at`), or ``("store", reading, [(place, path), …], file)``,
    answered with a list that has ``None`` for each image that went well, a tuple that says what of
    it is dropped, the reason why it cannot be read, or the JPEG file that is there instead.
    ``keep`` is how many bytes of decoded images this process may hold until they are stored;
    ``file`` is where they go, if that is not the memory that this process was started with.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides what Ctrl-C means
    connection = Connection(connection_fd)
    worker, requests = _Worker(memory_fd), SimpleQueue[tuple | None]()
    # Requests are taken at once: else each end could wait for the other to take what it sends.
    Thread(target=_receive, args=(connection, requests), daemon=True).start()
    while (request := requests.get()) is not None:
        try:
            connection.send(worker.answer(*request))
        except BrokenPipeError:
            return


def _receive(connection: Connection, requests: SimpleQueue[tuple | None]) -> None:
    """Put requests into a queue, and None once the connection ends."""
    try:
        while True:
            requests.put(connection.recv())
    except (EOFError, OSError):
        pass
    finally:
        requests.put(None)


class _Worker:
    def __init__(self, memory_fd: int):
        self.memory_fd = memory_fd
        self.memory: mmap.mmap | None = None
        self.opened: tuple[int, mmap.mmap] | None = None  # memory of another program
        self.held: dict[str, Image.Image | DeepImage] = {}
        self.held_bytes = 0

    def answer(self, kind: str, *arguments: Any) -> list[Any]:
        return self.look(*arguments) if kind == "look" else self.store(*arguments)

    def look(self, keep: int, images: list[tuple[str, IntensitySetting, bool]]) -> list[ImageFacts]:
        return [self._look_at(keep, *image) for image in images]

    def _look_at(
        self, keep: int, path: str, setting: IntensitySetting, with_statistics: bool
    ) -> ImageFacts:
        try:
            facts, image = look_at(Path(path), setting, with_statistics)
        except Exception as error:  # whatever a decoder raises; the others are read all the same
            return ImageFacts(_line(path, error))
        if image is not None and self.held_bytes + _bytes_of(image) <= keep:
            self.held[path] = image
            self.held_bytes += _bytes_of(image)
        return facts

    def store(
        self, reading: Reading, rows: list[tuple[int, str]], file: str | None
    ) -> list[Answer]:
        return [self._store(path, place, reading, file) for place, path in rows]

    def _store(self, path: str, place: int, reading: Reading, file: str | None) -> Answer:
        try:
            return self._store_one(path, place, reading, file)
        except Exception as error:  # an image that Pillow decodes, and that cannot be resized, say
            return str(error) if isinstance(error, InputError) else _line(path, error)

    def _store_one(self, path: str, place: int, reading: Reading, file: str | None) -> Answer:
        geometry = reading.geometry
        dropped: tuple[str, ...] = ()  # of an image that was looked at, it is known
        image = self.held.pop(path, None)
        if image is not None:
            self.held_bytes -= _bytes_of(image)
        memory = self._memory(place + reading.slot) if file is None else self._opened(file)
        jpeg = read_plain_jpeg(path, reading.value_range) if reading.jpegs else None
        if jpeg is not None:
            size = len(jpeg.data)
            if size <= reading.slot:
                memory[place : place + size] = jpeg.data
            return JpegFile(size, jpeg.pixels, size <= reading.slot)
        if image is None:
            rgb, dropped = load_and_tell(path, reading.value_range)
        else:
            rgb = to_eight_bit_rgb(image, reading.value_range, path)
        shape = (geometry.height, geometry.width, 3)
        target = np.ndarray(shape, np.uint8, memory, place)
        target[:] = np.asarray(geometry.apply(rgb))
        return dropped or None

    def _memory(self, needed: int) -> mmap.mmap:
        """Map the shared memory, again if it has grown since."""
        if self.memory is None or len(self.memory) < needed:
            self.memory = mmap.mmap(self.memory_fd, os.fstat(self.memory_fd).st_size)
        return self.memory

    def _opened(self, file: str) -> mmap.mmap:
        """Map memory of another program, which has all that it will need."""
        status = Path(file).stat()  # a later file may have the name of an earlier one
        if self.opened is None or self.opened[0] != status.st_ino:
            handle = os.open(file, os.O_RDWR)
            try:
                self.opened = (status.st_ino, mmap.mmap(handle, status.st_size))
            finally:
                os.close(handle)
        return self.opened[1]


def _bytes_of(image: Image.Image | DeepImage) -> int:
    if isinstance(image, DeepImage):
        return image.values.nbytes
    return image.width * image.height * len(image.getbands())


def _line(path: str, error: Exception) -> str:
    """Say in one line why an image cannot be read."""
    if isinstance(error, MemoryError):
        return f"{path} needs more memory than there is"
    text = str(error).strip().splitlines()
    return f"{path} cannot be read as an image: {text[0] if text else type(error).__name__}"
