"""Feed the trainable part: with cached features of the frozen backbone, or with images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastadapt.adapted_model import AdaptedModel
from fastadapt.data.images import ImageSource, to_device
from fastadapt.train.step import IGNORED

POOLED_AT_ONCE = 256  # images
PADDING = IGNORED  # the label of rows that only fill a batch up


class Source(Protocol):
    """Give one split as batches of inputs and labels on the device."""

    labels: np.ndarray  # [n] int64

    @property
    def num_views(self) -> int | None:
        """The number of views of each image; ``None`` for a fresh one each epoch."""

    def batches(
        self, order: np.ndarray, views: np.ndarray | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels [B] in this order; ``views`` is [n], ``None`` for plain ones."""


class FeatureSource:
    """Features of the frozen backbone: a tensor on the device, or a memory-mapped file.

    Args:
        features: [views, samples, N, C]; fp16 or fp32.
        labels: [samples] int64.
        device: where batches go.
        spatial: the shape that the backbone's layout gives the N tokens; empty for tokens.
        channels_last: whether that layout has the channels last.
        path: of the cache that they are in.
        rows: [n], which of the samples these are, where they are a subset; ``labels`` are theirs.
    """

    def __init__(
        self,
        features: Tensor | np.ndarray,
        labels: np.ndarray,
        device: torch.device,
        spatial: tuple[int, ...] = (),
        channels_last: bool = False,
        path: Path | None = None,
        rows: np.ndarray | None = None,
    ):
        self.path = path
        self.rows = rows
        self._whole: FeatureSource | None = None
        self.features = features
        self.labels = labels
        self.device = device
        self.spatial = spatial
        self.channels_last = channels_last
        self.num_views: int | None = len(features)

    def subset(self, rows: np.ndarray) -> FeatureSource:
        """Return some samples as a source of their own, without a copy of their features."""
        found = FeatureSource(
            self.features,
            self.labels[rows],
            self.device,
            self.spatial,
            self.channels_last,
            self.path,
            rows if self.rows is None else self.rows[rows],
        )
        found._whole = self if self._whole is None else self._whole
        return found

    def batches(
        self, order: np.ndarray, views: np.ndarray | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features in the backbone's layout and labels [B] on the device, in this order."""
        chosen = np.zeros(len(order), np.int64) if views is None else views[order]
        features, labels = self.features, self.labels[order]
        if self.rows is not None:
            order = self.rows[order]
        if isinstance(features, Tensor):
            # All indices go to the device at once: a step then takes its rows and nothing waits.
            flat = features.flatten(0, 1)
            rows = to_device(torch.from_numpy(chosen * features.shape[1] + order), self.device)
            on_device = to_device(torch.from_numpy(labels), self.device)
            for start in range(0, len(order), batch_size):
                end = start + batch_size
                yield self._in_layout(flat[rows[start:end]]), on_device[start:end]
            return
        for start in range(0, len(order), batch_size):
            end = start + batch_size
            batch = torch.from_numpy(features[chosen[start:end], order[start:end]])
            yield (
                self._in_layout(to_device(batch, self.device)),
                to_device(torch.from_numpy(labels[start:end]), self.device),
            )

    def _in_layout(self, batch: Tensor) -> Tensor:
        if self.spatial and self.channels_last:
            return batch.unflatten(1, self.spatial)
        if self.spatial:
            return batch.transpose(1, 2).unflatten(2, self.spatial)
        return batch

    @cached_property
    def pooled(self) -> np.ndarray:
        """The mean over tokens of the plain view, [samples, C] fp32."""
        if self._whole is not None and self.rows is not None:
            return self._whole.pooled[self.rows]
        plain, means = self.features[0], []
        for start in range(0, len(plain), POOLED_AT_ONCE):  # a mapped file may exceed the memory
            part = plain[start : start + POOLED_AT_ONCE]
            tokens = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
            means.append(tokens.float().mean(1).cpu())
        return torch.cat(means).numpy()


def logits_of(model: AdaptedModel, source: Source, inputs: Tensor) -> Tensor:
    """Return logits [B, num_classes] of a batch that the source gave."""
    if isinstance(source, ImageSource):
        return model(inputs)
    return logits_of_cached(model, inputs)


def logits_of_cached(model: AdaptedModel, features: Tensor) -> Tensor:
    """Return logits [B, num_classes] of features in the backbone's layout."""
    # Autocast's norms take any dtype on a GPU, where ours read fp16 as it is.
    if not (features.is_cuda and torch.is_autocast_enabled("cuda")):
        features = features.to(next(model.head.parameters()).dtype)
    return model.classify_features(features)


def padded(batch: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Fill a smaller last batch up with its first sample, which no loss or count sees.

    For samples that are independent of each other: a captured step then takes every batch.

    Returns:
        Inputs and labels with ``size`` rows; labels of added rows are ``PADDING``, or, where
        labels are shares of the classes, 0.
    """
    missing = size - len(batch)
    if missing <= 0:
        return batch, labels
    rows = torch.arange(size, device=batch.device).clamp(max=len(batch) - 1)
    value = PADDING if labels.dim() == 1 else 0
    filled = torch.cat([labels, labels.new_full((missing, *labels.shape[1:]), value)])
    return batch[rows], filled
