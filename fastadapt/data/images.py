"""Keep the images of a data set decoded, and give batches of them, augmented on the device.

A data set that fits is decoded once, by processes that are gone before the first batch; its batches
cost no more than the copy of their rows. One that does not fit is decoded by processes beside the
training, a few batches ahead. Both give the same batches.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastadapt.data.augment import Augmentation, draw, find_augmentation
from fastadapt.data.dataset import Sample
from fastadapt.data.decode import load_image
from fastadapt.data.decode_on import DecodeOn, check_decode
from fastadapt.data.decode_pool import (
    INLINE,
    Answer,
    DecodePool,
    Reading,
    Region,
    default_workers,
    open_region,
    shared_file,
)
from fastadapt.data.decode_ring import DecodeRing
from fastadapt.data.memory import available_memory
from fastadapt.data.preprocess import Preprocess
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError, counted, first_few
from fastadapt.processes import ALONE, Processes

if TYPE_CHECKING:
    from fastadapt.data.gpu_decode import GpuDecoder

HOST_SHARE = 0.5  # of the free memory that decoded images may take
DEVICE_SHARE = 0.3
DECODED_AT_ONCE = 128  # images, whole batches of them, where a GPU decodes


class ImageSource:
    """The images of one split, as batches on a device.

    Args:
        samples: of the split.
        preprocess: how images are resized, cropped and normalized.
        device: where batches go.
        workers: processes that decode; one for each core if ``None``.
        augment: what is drawn for views other than the plain one, view 0; or the name of it.
        seed: of the views (see :mod:`fastadapt.data.augment`).
        pool: processes that decode, of the caller's; else they start and end here.
        timed: makes a context that decoding ahead runs in.
        resident: whether images are kept decoded; if ``None``, where they fit.
        processes: that train together: those of a machine decode a share each and keep one copy.
        decode_on: what decodes JPEG files, processes or the GPU that ``device`` is; all others are
            decoded by processes.

    Raises:
        InputError: ``device`` is no GPU, or has no filter to resize as ``preprocess`` says.
    """

    num_views: int | None = None

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        device: torch.device,
        workers: int | None = None,
        augment: str | Augmentation = "none",
        seed: int = 0,
        *,
        pool: DecodePool | None = None,
        timed: Callable[[], AbstractContextManager] = nullcontext,
        resident: bool | None = None,
        processes: Processes = ALONE,
        decode_on: DecodeOn = "cpu",
    ):
        check_decode(decode_on, device)
        self.samples = samples
        self.preprocess = preprocess
        self.decode_on: DecodeOn = decode_on
        self.device = device
        self.workers = default_workers() if workers is None else workers
        self._augmentation = find_augmentation(augment)
        self.augment = self._augmentation.name
        self.seed = seed
        self.processes = processes
        self.labels = np.array([s.label for s in samples], dtype=np.int64)
        self._whole, self._rows = samples, np.arange(len(samples))
        self._plain = preprocess.geometry
        self._decode_pool, self._timed, self._resident = pool, timed, resident
        self._stored: dict[Geometry, Tensor] = {}  # [n, height, width, 3] uint8
        # Those that no pass uses.
        self._rings: dict[tuple[Geometry, int], list[DecodeRing]] = defaultdict(list)
        self._finishers: dict[Geometry, GpuDecoder] = {}
        self._draws: tuple[int, Tensor] | None = None  # of the last view

    def subset(
        self, rows: np.ndarray, augment: str | Augmentation = "none", seed: int = 0
    ) -> ImageSource:
        """Return some images as a source of their own, which shares what is decoded.

        Args:
            rows: places of the images.
            augment, seed: of its views; a view is drawn by the image's place in the whole.
        """
        found = copy.copy(self)
        found.samples = [self.samples[row] for row in rows]
        found.labels, found._rows = self.labels[rows], self._rows[rows]
        found._augmentation = find_augmentation(augment)
        found.augment, found.seed, found._draws = found._augmentation.name, seed, None
        return found

    @property
    def _paths(self) -> list[str]:
        return [str(sample.path) for sample in self._whole]

    def needed_bytes(self, views: bool = False) -> int:
        """Return what the images take as they are kept: plain, or as views need them."""
        geometry = self._augmentation.stored(self._plain) if views else self._plain
        return len(self._whole) * geometry.height * geometry.width * 3

    def decode(self, views: bool = False) -> bool:
        """Decode all images now and keep them, if they fit.

        Args:
            views: as augmented views need them; else for the plain one.

        Returns:
            Whether they are kept; else batches are streamed.

        Raises:
            InputError: an image cannot be read.
        """
        geometry = self._augmentation.stored(self._plain) if views else self._plain
        if geometry in self._stored:
            return True
        needed = self.needed_bytes(views)
        fits = needed <= HOST_SHARE * available_memory() if self._resident is None else True
        if not self.processes.all_true(fits and self._resident is not False):
            return False
        with self._timed():
            images = self._decode_all(geometry)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if needed <= DEVICE_SHARE * free:
                images = images.to(self.device)
        self._stored[geometry] = images
        return True

    def batches(
        self, order: np.ndarray, views: np.ndarray | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized images [B, 3, H, W] fp32 and labels [B] int64, in this order.

        Args:
            order: places of the images in the split.
            views: [n], the number of each image's view; ``None`` for the plain ones. All are 0, or
                none is.
            batch_size: the last batch may be smaller.

        Raises:
            InputError: an image cannot be read.
        """
        view = 0 if views is None or len(order) == 0 else int(views[order[0]])
        if views is not None and view and not (views[order] == view).all():
            raise ValueError("all images of a pass have the same view")
        augmented = view > 0 and self.augment != "none"
        draws = self._draws_of(view) if augmented else None
        labels = torch.from_numpy(self.labels).to(self.device)
        in_whole = self._rows[order]
        places = torch.from_numpy(np.stack([order, in_whole])).to(self.device)
        geometry = self._augmentation.stored(self._plain) if augmented else self._plain
        start = 0
        for images in self._uint8_batches(in_whole, geometry, augmented, batch_size):
            here, rows = places[:, start : start + len(images)]
            start += len(images)
            if draws is not None:
                images = self._augmentation.apply(images, draws[rows], self._plain)
            images = self.preprocess.normalize(images)
            yield images.contiguous(memory_format=torch.channels_last), labels[here]

    def _draws_of(self, view: int) -> Tensor:
        if self._draws is None or self._draws[0] != view:
            table = torch.from_numpy(draw(self.seed, view, len(self._whole)))
            self._draws = (view, table.to(self.device))
        return self._draws[1]

    def _uint8_batches(
        self, order: np.ndarray, geometry: Geometry, views: bool, batch_size: int
    ) -> Iterator[Tensor]:
        """Yield [B, 3, height, width] uint8 on the device, channels last."""
        if not self.decode(views):
            yield from self._streamed(order, geometry, batch_size)
            return
        stored = self._stored[geometry]
        places = torch.from_numpy(np.ascontiguousarray(order)).to(stored.device)
        for start in range(0, len(order), batch_size):
            batch = stored[places[start : start + batch_size]]
            yield to_device(batch, self.device).permute(0, 3, 1, 2)

    def _reading(self, geometry: Geometry) -> Reading:
        return Reading(geometry, self.preprocess.intensity_range)

    def _finisher(self, geometry: Geometry) -> GpuDecoder | None:
        """Return what decodes JPEG files on the GPU, if they are decoded there."""
        if self.decode_on == "cpu":
            return None
        if geometry not in self._finishers:
            from fastadapt.data.gpu_decode import GpuDecoder  # torchvision: not for all others

            self._finishers[geometry] = GpuDecoder(self._reading(geometry), self.device)
        return self._finishers[geometry]

    def _decode_all(self, geometry: Geometry) -> Tensor:
        paths, shape = self._paths, (len(self._whole), geometry.height, geometry.width, 3)
        if self._decode_pool is None and len(paths) <= INLINE and self.decode_on == "cpu":
            images = torch.empty(shape, dtype=torch.uint8)
            for place, path in enumerate(paths):
                image = load_image(path, self._reading(geometry).value_range)
                pixels = np.array(geometry.apply(image))
                images[place] = torch.from_numpy(pixels)
            return images
        pool = self._decode_pool or DecodePool(self.workers)
        try:
            if self.processes.place.local_size > 1:
                region = self._decode_share(pool, geometry)
            else:
                region = pool.memory(len(paths), self._reading(geometry).slot)
                check_decoded(self._store(pool, geometry, range(len(paths)), region))
            return torch.frombuffer(region.bytes, dtype=torch.uint8).view(shape)
        finally:
            if pool is not self._decode_pool:
                pool.close()

    def _decode_share(self, pool: DecodePool, geometry: Geometry) -> Region:
        """Decode this process's images into memory that the machine's processes share."""
        processes, paths = self.processes, self._paths
        place = processes.place
        with shared_file() as file:
            # Ranks of a machine follow each other, and the first of them has the memory.
            first = processes.gather(file)[place.rank - place.local_rank]
            if first is None:
                region = pool.memory(len(paths), self._reading(geometry).slot)
                mine = list(range(len(paths)))
            else:
                region = open_region(first, len(paths), geometry)
                mine = [i for i, path in enumerate(paths) if place.owns_here(path)]
            processes.gather(None)  # all of the memory is there before anyone maps it
            found = self._store(pool, geometry, mine, region)
            answers = processes.gather([answer for answer in found if answer is not None])
        # Machines read the same files: one process's problem is everyone's.
        check_decoded([answer for found in answers for answer in found])
        return region

    def _store(
        self, pool: DecodePool, geometry: Geometry, rows: Sequence[int], region: Region
    ) -> list[Answer]:
        """Decode images into their places of a region; return the answers."""
        paths, finish = self._paths, self._finisher(geometry)
        if finish is None:
            chosen = [paths[row] for row in rows]
            return pool.store(chosen, self._reading(geometry), region, rows).wait()
        stored = torch.frombuffer(region.bytes, dtype=torch.uint8)
        stored = stored.view(-1, geometry.height, geometry.width, 3)
        size = DECODED_AT_ONCE
        batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
        ring, answers = DecodeRing(pool, finish.reading, size), list[Answer]()
        decoded = ring.batches([paths[row] for row in batch] for batch in batches)
        for batch, found in zip(batches, decoded, strict=True):
            pixels, said = finish(found)
            stored[batch] = pixels.cpu()
            answers += said
        return answers

    def _streamed(self, order: np.ndarray, geometry: Geometry, batch_size: int) -> Iterator[Tensor]:
        """Decode batches ahead, in a ring of shared memory."""
        paths, finish = self._paths, self._finisher(geometry)
        size = batch_size
        if finish is not None:
            size *= max(DECODED_AT_ONCE // batch_size, 1)
        starts = range(0, len(order), size)
        batches = ([paths[row] for row in order[i : i + size]] for i in starts)
        with self._free_ring(geometry, size) as ring:
            for decoded in ring.batches(batches):
                if finish is not None:
                    pixels, answers = finish(decoded)
                    check_decoded(answers)
                    for batch in pixels.split(batch_size):
                        yield batch.permute(0, 3, 1, 2)
                    continue
                check_decoded(decoded.answers)
                batch = torch.from_numpy(ring.pixels(decoded))
                if self.device.type == "cuda":
                    batch = batch.to(self.device, non_blocking=True)
                    torch.cuda.current_stream(self.device).synchronize()
                else:
                    batch = batch.clone()
                yield batch.permute(0, 3, 1, 2)

    @contextmanager
    def _free_ring(self, geometry: Geometry, batch_size: int) -> Iterator[DecodeRing]:
        """Give memory for the batches that are ahead: page-locked, and of one pass at a time.

        What a pass that was left early still had in work is overwritten in time: the same process
        decodes the same place, one request after the other.
        """
        free = self._rings[geometry, batch_size]
        try:  # at once: another thread may take the last one
            ring = free.pop()
        except IndexError:
            ring = self._new_ring(geometry, batch_size)
        try:
            yield ring
        finally:
            free.append(ring)

    def _new_ring(self, geometry: Geometry, batch_size: int) -> DecodeRing:
        if self._decode_pool is None:
            self._decode_pool = DecodePool(self.workers)  # for all further passes, too
        finish = self._finisher(geometry)
        reading = self._reading(geometry) if finish is None else finish.reading
        ring = DecodeRing(self._decode_pool, reading, batch_size)
        if self.device.type == "cuda":
            lock_pages(ring, self.device)
        return ring


def check_decoded(answers: Sequence[Answer]) -> None:
    """Refuse images that could not be read.

    Args:
        answers: for each image, as a pool of decoders gives them.

    Raises:
        InputError: one cannot be read; it names the first few.
    """
    reasons = [answer for answer in answers if isinstance(answer, str)]
    if reasons:
        raise InputError(
            f"{counted(len(reasons), 'image')} cannot be read any more: {first_few(reasons, 2)}. "
            "Were they "
            "moved, deleted or overwritten while this command ran?"
        )


def lock_pages(ring: DecodeRing, device: torch.device) -> None:
    """Page-lock a ring's memory for as long as it lives, so that copies need no host.

    Where that fails, copies wait for the host, and are right all the same.
    """
    runtime, memory = torch.cuda.cudart(), torch.from_numpy(ring.slots)
    if int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
        # Memory that is mapped later may have the same address.
        unlock = weakref.finalize(ring, runtime.cudaHostUnregister, memory.data_ptr())
        unlock.atexit = False
        return
    with suppress(RuntimeError):  # the error that the runtime keeps is the next call's
        torch.zeros(1, device=device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without waiting for the GPU."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
