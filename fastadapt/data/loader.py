"""Feed a training loop of one's own: images decoded once, batches augmented on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadapt.data.augment import Augmentation, check_augment
from fastadapt.data.dataset import read_dataset
from fastadapt.data.decode_on import DecodeOn
from fastadapt.data.images import ImageSource
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError


class ImageLoader:
    """Batches of labelled images, on the device, ready for a model.

    Images are decoded once, by processes, and kept as uint8 on the GPU or in memory where they fit;
    else processes decode them beside the training. Each iteration is an epoch, in an order and with
    views that follow from the seed and the number of the epoch.

    Args:
        data: as for :func:`fastadapt.data.dataset.read_dataset`.
        preprocess: timm's configuration of the input (``model.pretrained_cfg``), or a
            :class:`fastadapt.data.preprocess.Preprocess`.
        batch_size: images in a batch.
        split: ``"train"``, ``"val"`` or ``"test"``. Training images come in random order, and a
            smaller last batch is left out, so that :class:`fastadapt.GraphedStep` meets one shape.
        augment: what is drawn for training images: ``"none"``, ``"flips"``, ``"dihedral"``,
            ``"crops"``, ``"imagenet"``, or a :class:`fastadapt.data.augment.Augmentation`.
        device: where batches go.
        seed: of order and views, and of the validation split where ``data`` gives none.
        workers: processes that decode; one for each core if ``None``.
        decode: ``"gpu"`` to decode JPEG files on the GPU that ``device`` is.

    Attributes:
        classes: names of the classes, in the order of the labels.
        epoch: how many iterations were begun; set it to go on after an interruption.

    Raises:
        InputError: the data set or the settings do not fit; an image cannot be read.
    """

    def __init__(
        self,
        data: str | Path,
        preprocess: Preprocess | dict[str, Any],
        batch_size: int,
        *,
        split: str = "train",
        augment: str | Augmentation = "none",
        device: str | torch.device = "cpu",
        seed: int = 0,
        workers: int | None = None,
        decode: DecodeOn = "cpu",
    ):
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1")
        dataset = read_dataset(data, seed=seed)
        samples = dataset.split(split)
        if not samples:
            raise InputError(f"{data} has no {split!r} split; expected train, val or test")
        if not isinstance(preprocess, Preprocess):
            preprocess = Preprocess.from_pretrained_cfg(preprocess)
        check_augment(augment, preprocess)
        self.classes = dataset.classes
        self.batch_size = batch_size
        self.epoch = 0
        self._seed = seed
        self._training = split == "train"
        target = torch.device(device)
        self._source = ImageSource(
            samples, preprocess, target, workers, augment, seed, decode_on=decode
        )

    def __len__(self) -> int:
        count = len(self._source.labels)
        return (math.floor if self._training else math.ceil)(count / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalized images [B, 3, H, W] fp32, channels last, and labels [B] int64."""
        self.epoch += 1
        count = len(self._source.labels)
        order, views = np.arange(count), None
        if self._training:
            order = np.random.default_rng((self._seed, self.epoch)).permutation(count)
            order = order[: len(self) * self.batch_size]
            views = np.full(count, self.epoch)
        return self._source.batches(order, views, self.batch_size)
