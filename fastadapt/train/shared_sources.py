"""Share features and decoded images of a whole data set among runs with different splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fastadapt.data.augment import Augmentation
from fastadapt.data.dataset import Sample
from fastadapt.data.images import ImageSource
from fastadapt.train.sources import FeatureSource


@dataclass(frozen=True)
class SharedSources:
    """What was computed once, of which every run takes the images of its splits.

    Attributes:
        images: of the whole data set.
        features: cached ones of the whole data set, in all views; ``None`` where none are cached.
    """

    images: ImageSource
    features: FeatureSource | None

    @cached_property
    def _places(self) -> dict[Path, int]:
        return {sample.path: place for place, sample in enumerate(self.images.samples)}

    def _rows(self, samples: Sequence[Sample]) -> np.ndarray:
        return np.array([self._places[sample.path] for sample in samples], np.int64)

    def features_of(self, samples: Sequence[Sample]) -> FeatureSource:
        """Return the cached features of some images."""
        assert self.features is not None
        return self.features.subset(self._rows(samples))

    def images_of(
        self, samples: Sequence[Sample], augment: str | Augmentation, seed: int
    ) -> ImageSource:
        """Return some images, with their own draws of views."""
        return self.images.subset(self._rows(samples), augment, seed)
