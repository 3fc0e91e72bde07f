"""Decode JPEG files on the GPU, and all other files in processes beside it.

nvJPEG, through torchvision, decodes a whole batch at once; the GPU resizes it, too. Its pixels
differ from those of a processor by a value or two of 255: it rounds the inverse cosine transform
in another way, and enlarges colour differences in another way. The predictions are the same but
for near ties (tests/export/predict/test_gpu_decode.py).
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from fastadapt.data.decode import load_image
from fastadapt.data.decode_pool import Reading
from fastadapt.data.resize import Geometry, resized_size
from fastadapt.errors import InputError

from .decode_ahead import READ_AHEAD, DecodedBatch, Group, PoolDecoder, read_or_say

EIGHT_BITS = (0.0, 255.0)
FILTERS = ("bilinear", "bicubic")  # of Pillow's, those that PyTorch has
_ORIENTATION, _UPRIGHT = 0x0112, 1
_RGB = [ord(letter) for letter in "RGB"]  # ids of components that are not luma and chroma


class GpuDecoder:
    """Decode batches of paths, JPEG files on a GPU; an argument of :class:`PartMaker`'s ``run``.

    Args:
        reading: how images become pixels of one size.
        batch: most images of a batch.
        workers: threads that read files, and processes that decode what is no plain JPEG.
        device: of the GPU. On a CPU the same is done there, which only tests want.

    Raises:
        InputError: the GPU can't do what ``reading`` asks for.
    """

    def __init__(self, reading: Reading, batch: int, workers: int, device: torch.device):
        geometry, values = reading.geometry, reading.value_range
        if geometry.interpolation not in FILTERS:
            raise InputError(
                f"a GPU resizes by {' or '.join(FILTERS)}, and this model asks for "
                f"{geometry.interpolation}: leave out `decode`"
            )
        if values is not None and tuple(values) != EIGHT_BITS:
            raise InputError(
                f"a GPU decodes 8-bit files as they are, and this model has an intensity range of "
                f"{values[0]:g}:{values[1]:g}: leave out `decode`"
            )
        self.reading, self.workers, self.device = reading, workers, device
        self._cpu = PoolDecoder(reading, batch, workers)
        self._open = ExitStack()

    def __enter__(self) -> GpuDecoder:
        self._threads = self._open.enter_context(ThreadPoolExecutor(self.workers))
        self._decode_others = self._open.enter_context(self._cpu)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(self, batches: Iterable[Sequence[str]]) -> Iterator[DecodedBatch]:
        """Decode batches in order.

        Yields:
            Groups of images, by how they were decoded, and what cannot be read.
        """
        sent: deque[tuple[list[str], dict[int, Tensor]]] = deque()

        def others() -> Iterator[list[str]]:
            for paths, files in self._read(batches):
                sent.append((paths, files))
                yield [path for place, path in enumerate(paths) if place not in files]

        for decoded in self._decode_others(others()):
            paths, files = sent.popleft()
            others_places = [place for place in range(len(paths)) if place not in files]
            problems = {others_places[i]: why for i, why in decoded.problems.items()}
            dropped = {others_places[i]: what for i, what in decoded.dropped.items()}
            groups: list[Group] = [
                ([others_places[i] for i in rows], pixels) for rows, pixels in decoded.groups
            ]
            groups += self._on_gpu(paths, files, problems) if files else []
            yield DecodedBatch(groups, problems, dropped)

    def _read(
        self, batches: Iterable[Sequence[str]]
    ) -> Iterator[tuple[list[str], dict[int, Tensor]]]:
        """Read files in threads, a few batches ahead; keep those that a GPU decodes."""
        ahead: deque[tuple[list[str], Any]] = deque()

        def read_one() -> tuple[list[str], dict[int, Tensor]]:
            paths, found = ahead.popleft()
            return paths, {i: file for i, file in enumerate(found) if file is not None}

        for batch in batches:
            paths = list(batch)
            ahead.append((paths, self._threads.map(read_plain_jpeg, paths)))
            if len(ahead) > READ_AHEAD:
                yield read_one()
        while ahead:
            yield read_one()

    def _on_gpu(
        self, paths: list[str], files: dict[int, Tensor], problems: dict[int, str]
    ) -> list[Group]:
        """Decode files that were read; damaged ones, and those beside them, on the CPU."""
        try:
            return [(list(files), self._pixels(list(files.values())).cpu().numpy())]
        except RuntimeError:  # of torchvision, for the whole batch
            pass
        pixels: dict[int, np.ndarray] = {}
        answers = self._threads.map(
            partial(read_or_say, self._on_cpu), [paths[place] for place in files]
        )
        for place, answer in zip(files, answers, strict=True):
            if isinstance(answer, str):
                problems[place] = answer
            else:
                pixels[place] = answer
        return [(list(pixels), np.stack([*pixels.values()]))] if pixels else []

    def _pixels(self, files: list[Tensor]) -> Tensor:
        """Return uint8 [files, H, W, 3] on the device."""
        from torchvision.io import ImageReadMode, decode_jpeg

        images = decode_jpeg(files, mode=ImageReadMode.RGB, device=self.device)
        sizes: dict[torch.Size, list[int]] = {}
        for place, image in enumerate(images):
            sizes.setdefault(image.shape, []).append(place)
        geometry = self.reading.geometry
        result = images[0].new_empty(len(images), 3, geometry.height, geometry.width)
        for places in sizes.values():
            result[places] = apply_geometry(
                geometry, torch.stack([images[place] for place in places])
            )
        return result.permute(0, 2, 3, 1).contiguous()

    def _on_cpu(self, path: str) -> np.ndarray:
        image = load_image(path, self.reading.value_range)
        return np.asarray(self.reading.geometry.apply(image))


def read_plain_jpeg(path: str) -> Tensor | None:
    """Read a file, uint8 [bytes], if it is a JPEG that a GPU decodes as Pillow does.

    That is a whole one of 8 bits, in gray or in luma and chroma, that need not be turned. ``None``
    for all others, also for those that cannot be read: whoever decodes them says why.
    """
    try:
        data = Path(path).read_bytes()
        if not data.startswith(b"\xff\xd8\xff") or not data.rstrip(b"\0").endswith(b"\xff\xd9"):
            return None  # nvJPEG takes a truncated file for a whole one
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.format != "JPEG" or image.mode not in ("L", "RGB"):
                return None
            if image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT:
                return None
            if image.mode == "RGB" and _is_rgb_inside(image):
                return None
    except Exception:  # Pillow raises almost anything on damaged files
        return None
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _is_rgb_inside(image: Image.Image) -> bool:
    """Say whether a JPEG holds red, green and blue rather than luma and chroma."""
    components = [layer[0] for layer in getattr(image, "layer", [])]
    return image.info.get("adobe_transform") == 0 or components == _RGB


def apply_geometry(geometry: Geometry, images: Tensor) -> Tensor:
    """Resize and crop images of one size, as :meth:`Geometry.apply` does with one.

    Args:
        geometry: what is done.
        images: uint8 [B, 3, H, W], on any device.

    Returns:
        uint8 [B, 3, geometry.height, geometry.width].
    """
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    height, width = images.shape[2:]
    new_width, new_height = resized_size((width, height), geometry.target, geometry.crop_mode)
    if (new_width, new_height) != (width, height):
        filter_ = InterpolationMode(geometry.interpolation)
        images = resize(images, [new_height, new_width], filter_, antialias=True)
    return _center_crop(geometry, images)


def _center_crop(geometry: Geometry, images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    x, y = max(geometry.width - width, 0), max(geometry.height - height, 0)
    if x or y:
        border = (x // 2, (x + 1) // 2, y // 2, (y + 1) // 2)
        fill = geometry.fill if geometry.crop_mode == "border" else (0, 0, 0)
        planes = zip(images.unbind(1), fill, strict=True)
        images = torch.stack([pad(plane, border, value=value) for plane, value in planes], dim=1)
        height, width = images.shape[2:]
    left = round((width - geometry.width) / 2.0)
    top = round((height - geometry.height) / 2.0)
    return images[:, :, top : top + geometry.height, left : left + geometry.width]
