"""Decode JPEG files on the GPU, beside processes that decode all other files.

1. A process reads a file. If it is a JPEG that a GPU decodes as Pillow does, its bytes are handed
   over in shared memory, else the pixels (:class:`fastadapt.data.decode_pool.JpegFile`).
2. nvJPEG, through torchvision, decodes the JPEG files of a batch at once, while the GPU computes
   what was launched before. The thread that launches waits for it; no other thread decodes.
3. They are resized (:mod:`fastadapt.data.gpu_resize`) on a stream of its own, for which the next
   launches wait, and the thread does not.

Pixels differ from those of a processor by a value or two of 255: nvJPEG rounds the inverse cosine
transform in another way, and enlarges colour differences in another way. The predictions are the
same but for near ties (tests/data/test_gpu_decode.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from fastadapt.data.decode import load_image, read_or_say
from fastadapt.data.decode_on import check_filter
from fastadapt.data.decode_pool import Answer, JpegFile, Reading
from fastadapt.data.decode_ring import RingBatch, pixels_of
from fastadapt.data.gpu_resize import Resizer
from fastadapt.data.nvjpeg import decode_jpegs
from fastadapt.data.pixels import eight_bit_table

AT_ONCE = 2**25  # pixels that are decoded at once: 96 MiB, and four times as much to resize


class GpuDecoder:
    """Finish batches in which processes left JPEG files to the GPU.

    Args:
        reading: how images become pixels of one size.
        device: of the GPU. On a CPU the same is done there, which only tests want.

    Attributes:
        reading: for the processes.

    Raises:
        InputError: the GPU can't do what ``reading`` asks for.
    """

    def __init__(self, reading: Reading, device: torch.device):
        check_filter(reading.geometry)
        self.reading = reading._replace(jpegs=True)
        self.device = device
        # What it does is short, and much waits for it.
        self._side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._resize = Resizer(reading.geometry)
        self._table: Tensor | None = None
        if reading.value_range is not None and tuple(reading.value_range) != (0, 255):
            low, high = reading.value_range
            self._table = torch.from_numpy(eight_bit_table(low, high)).to(device)

    def __call__(self, batch: RingBatch) -> tuple[Tensor, list[Answer]]:
        """Decode the JPEG files of a batch.

        Args:
            batch: as processes decoded it for :attr:`reading`; free when this returns.

        Returns:
            uint8 [images, H, W, 3] on the device, for the current stream, with anything for images
            that cannot be read; and the answers, of which no :class:`JpegFile` is left.
        """
        with self._aside():
            geometry, answers = self.reading.geometry, list(batch.answers)
            shape = (len(answers), geometry.height, geometry.width, 3)
            pixels = torch.empty(shape, dtype=torch.uint8, device=self.device)
            others = [i for i, answer in enumerate(answers) if not isinstance(answer, JpegFile)]
            if others:
                decoded = pixels_of(self.reading, batch.slots[others])
                pixels[self._index(others)] = torch.from_numpy(decoded).to(self.device)
            for files in _parts(batch.answers):
                self._decode(files, batch, pixels, answers)
        if self._side is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._side)
            pixels.record_stream(current)
        return pixels, answers

    def _aside(self) -> AbstractContextManager:
        """Allocate and launch on a stream of its own."""
        return nullcontext() if self._side is None else torch.cuda.stream(self._side)

    def _decode(
        self, places: list[int], batch: RingBatch, pixels: Tensor, answers: list[Answer]
    ) -> None:
        """Decode the files in some places into ``pixels``; say in ``answers`` what went wrong."""
        files: dict[int, Tensor] = {}
        for place in places:
            try:
                files[place] = _bytes_of(batch, place)
                answers[place] = None
            except OSError:  # gone since
                answers[place] = self._on_cpu(batch.paths[place], pixels[place])
        sizes: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        decoded = self._decoded(list(files.values())) if files else []
        for place, image in zip(files, decoded, strict=True):
            if image is None:
                answers[place] = self._on_cpu(batch.paths[place], pixels[place])
            else:
                sizes.setdefault(image.shape, []).append((place, image))
        for found in sizes.values():
            images = torch.stack([image for _, image in found])
            resized = self._resize(images).permute(0, 2, 3, 1)
            pixels[self._index([place for place, _ in found])] = resized

    def _index(self, places: list[int]) -> Tensor:
        return torch.tensor(places, device=self.device)

    def _decoded(self, files: list[Tensor]) -> list[Tensor | None]:
        """Return uint8 [3, H, W] for each file, and ``None`` where nvJPEG refuses it."""
        if self._side is not None:
            # torchvision allocates on this stream, and writes on one that does not wait for it.
            self._side.synchronize()
        try:
            images = decode_jpegs(files, self.device)
        except RuntimeError:  # of all files, without a word on which
            if len(files) == 1:
                return [None]
            half = len(files) // 2
            return self._decoded(files[:half]) + self._decoded(files[half:])
        if self._table is None:
            return list(images)
        return [self._table[image.int()] for image in images]

    def _on_cpu(self, path: str, pixels: Tensor) -> str | None:
        """Decode a file here; return why it cannot be read."""
        image = read_or_say(lambda path: load_image(path, self.reading.value_range), path)
        if isinstance(image, str):
            return image
        pixels.copy_(torch.from_numpy(np.array(self.reading.geometry.apply(image))))
        return None


def _parts(answers: Sequence[Answer]) -> Iterator[list[int]]:
    """Yield the places of JPEG files, as many as are decoded at once."""
    places, pixels = list[int](), 0
    for place, answer in enumerate(answers):
        if not isinstance(answer, JpegFile):
            continue
        if places and pixels + answer.pixels > AT_ONCE:
            yield places
            places, pixels = [], 0
        places.append(place)
        pixels += answer.pixels
    if places:
        yield places


def _bytes_of(batch: RingBatch, place: int) -> Tensor:
    """Return a file, uint8 [bytes], read again where it was too large to be handed over."""
    file = batch.answers[place]
    assert isinstance(file, JpegFile)
    if file.sent:
        return torch.from_numpy(batch.slots[place, : file.size])
    return torch.from_numpy(np.fromfile(batch.paths[place], np.uint8))
