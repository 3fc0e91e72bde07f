"""Give each split of a run as images or as cached features, and training and validation as one.

Where the model is trained again on training and validation images (``TrainConfig.refit``), both
splits are parts of one source, so that nothing is decoded or computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fastadapt.data.dataset import Dataset, Sample
from fastadapt.data.decode_pool import DecodePool
from fastadapt.data.images import ImageSource
from fastadapt.data.preprocess import Preprocess
from fastadapt.processes import ALONE, Processes
from fastadapt.train.cache_file import is_cache
from fastadapt.train.config import TrainConfig
from fastadapt.train.feature_cache import CacheSettings
from fastadapt.train.shared_sources import SharedSources
from fastadapt.train.sources import FeatureSource

REFITTED = "train and val"  # the splits that a refit trains on
PARTS = ("train", "val")


@dataclass
class SplitSources:
    """The images and the cached features of a data set, by split.

    Attributes:
        dataset, preprocess: the images, and how they are read.
        config: of the run.
        device: where batches go.
        workers: processes that decode.
        amp: precision that cached features are computed in, for the cache's key.
        timed: makes a context that decoding ahead runs in.
        pool: processes that decode, of the caller's.
        shared: features and images of a whole data set, of which the splits are taken.
        processes: that train together.
        features: cached ones, by split; empty where nothing is cached, or not needed any more.
    """

    dataset: Dataset
    preprocess: Preprocess
    config: TrainConfig
    device: torch.device
    workers: int
    amp: str
    timed: Callable[[], AbstractContextManager]
    pool: DecodePool | None = None
    shared: SharedSources | None = None
    processes: Processes = ALONE
    features: dict[str, FeatureSource] = field(default_factory=dict)

    def __post_init__(self):
        self._images: dict[str, ImageSource] = {}

    @property
    def splits(self) -> list[str]:
        """The splits that have images."""
        return [split for split in ("train", "val", "test") if self.dataset.split(split)]

    @property
    def wholes(self) -> list[str]:
        """What is decoded or computed at once: the splits, or two of them together."""
        if not self.config.refit:
            return self.splits
        return [REFITTED, *(split for split in self.splits if split not in PARTS)]

    def samples(self, split: str) -> list[Sample]:
        """Return the images of a split, or of :data:`REFITTED`, sorted by path."""
        return self.dataset.split(*(PARTS if split == REFITTED else (split,)))

    def images(self, split: str) -> ImageSource:
        """Return the images of a split; training ones with their augmentation."""
        if split not in self._images:
            self._images[split] = self._made(split)
        return self._images[split]

    def decode(self, split: str) -> bool:
        """Decode a whole as its views and its plain images are needed; say whether all is kept."""
        trains = split in ("train", REFITTED)
        kept = not trains or self.images(split).decode(self.config.augments)
        return kept and (split == "train" or self.images(split).decode())

    def needed_bytes(self) -> int:
        """Return what all images take as they are kept decoded, as plain ones."""
        return sum(self.images(split).needed_bytes() for split in self.wholes)

    def cache(self, compute: Callable[[ImageSource, CacheSettings, str], FeatureSource]) -> None:
        """Fill :attr:`features`.

        Args:
            compute: gives the features of images by the settings of a cache, from there or new;
                its last argument is for the progress bar.
        """
        if self.shared is not None:
            wanted = self.splits + [REFITTED] * self.config.refit
            self.features = {
                split: self.shared.features_of(self.samples(split)) for split in wanted
            }
            return
        for split in self.wholes:
            images = self.images(split)
            settings = CacheSettings(
                views=self.config.views if split in ("train", REFITTED) else 1,
                augment=images.augment,
                seed=self.config.seed,
                dtype=self.config.feature_dtype,
                amp=self.amp,
            )
            self.features[split] = compute(images, settings, split)
        if self.config.refit:
            whole = self.features[REFITTED]
            self.features |= {split: whole.subset(self._rows(split)) for split in PARTS}

    def remove_other_caches(self, folder: Path) -> None:
        """Remove caches in a folder that :attr:`features` are not in."""
        paths = [source.path for source in self.features.values()]
        used = {path.resolve() for path in paths if path is not None}
        for path in folder.glob("*.npy"):
            if path.resolve() not in used and is_cache(path):
                path.unlink()

    def _made(self, split: str) -> ImageSource:
        config = self.config
        augment = config.augmentation() if split in ("train", REFITTED) else "none"
        if self.shared is not None:
            return self.shared.images_of(self.samples(split), augment, config.seed)
        if config.refit and split in PARTS:
            return self.images(REFITTED).subset(self._rows(split), augment, config.seed)
        return ImageSource(
            self.samples(split),
            self.preprocess,
            self.device,
            self.workers,
            augment,
            config.seed,
            pool=self.pool,
            timed=self.timed,
            processes=self.processes,
            decode_on=config.decode,
        )

    def _rows(self, split: str) -> np.ndarray:
        """Return the places of a split's images among those of both."""
        kept = [sample.split == split for sample in self.samples(REFITTED)]
        return np.flatnonzero(kept)
