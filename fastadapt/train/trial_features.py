"""Compute the features that trials share: once for all images, reduced where a CPU trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import nn

from fastadapt.adapted_model import AdaptedModel, adapt
from fastadapt.config import AdaptConfig
from fastadapt.data.dataset import Sample
from fastadapt.data.decode_pool import DecodePool
from fastadapt.data.images import ImageSource
from fastadapt.data.pixels import ValueRange
from fastadapt.data.preprocess import Preprocess
from fastadapt.train.config import TrainConfig
from fastadapt.train.feature_cache import CacheSettings, CacheWriter, cached_source
from fastadapt.train.precision import precision
from fastadapt.train.trials import Features, pooled

# On a CPU a trial's cost is proportional to the positions: 4 of a map are its quarters.
CPU_POSITIONS = 4


@dataclass(frozen=True)
class FrozenBackbone:
    """A backbone that only gives features, and how it sees images.

    Attributes:
        name: timm's, or a module's class.
        model: with an adapter, so that all positions are kept.
        preprocess: of the images.
        pretrained, weights: as for :func:`fastadapt.adapt`.
    """

    name: str
    model: AdaptedModel
    preprocess: Preprocess
    pretrained: bool = True
    weights: str | None = None


def frozen_backbone(
    backbone: str | nn.Module,
    image_size: int | None = None,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    preprocess: dict[str, Any] | None = None,
    features: Any = None,
) -> FrozenBackbone:
    """Make a backbone that gives features.

    Args:
        backbone, pretrained, weights: as for :func:`fastadapt.adapt`.
        image_size: height and width in pixels; the backbone's own if ``None``.
        preprocess: settings of :class:`fastadapt.data.preprocess.Preprocess` that differ from
            those that the backbone was trained with.
        features: which of its features, as :class:`fastadapt.AdaptConfig` says.
    """
    size = None if image_size is None else (3, image_size, image_size)
    small = AdaptConfig(rank=1, num_centers=1, mlp_ratio=1.0, input_size=size, features=features)
    found = None if weights is None else str(Path(weights).absolute())
    model = adapt(backbone, small, 2, pretrained=pretrained, weights=found)
    images = Preprocess.from_pretrained_cfg(model.pretrained_cfg, **(preprocess or {}))
    return FrozenBackbone(model.source["name"], model, images, pretrained, found)


def trial_features(
    backbone: FrozenBackbone,
    parts: Mapping[str, Sequence[Sample]],
    classes: tuple[str, ...],
    config: TrainConfig,
    device: torch.device,
    folder: Path,
    progress: Progress,
    *,
    pool: DecodePool | None = None,
    workers: int | None = None,
    value_range: ValueRange | None = None,
    positions: int | None = None,
) -> Features:
    """Compute the features of all parts, or read them from the cache, as one data set.

    Args:
        backbone: of :func:`frozen_backbone`.
        parts: the images, by split; only those of ``train`` have views.
        classes: names.
        config: says views, augmentation, seed, precision and the type of the features.
        device: where to compute.
        folder: of the cache.
        progress: bars and lines.
        pool, workers: processes that decode.
        value_range: of the images.
        positions: to keep of each image at most, 4 on a CPU and all on a GPU if ``None``.

    Returns:
        Features of the parts' images, one part after the other.
    """
    if positions is None and device.type == "cpu":
        positions = CPU_POSITIONS
    amp_dtype = precision(config.amp, device)
    model = backbone.model.to(device).to(memory_format=torch.channels_last)
    preprocess = replace(backbone.preprocess, intensity_range=value_range)

    def autocast():
        return nullcontext() if amp_dtype is None else torch.autocast(device.type, dtype=amp_dtype)

    found, labels, writers = [], [], list[CacheWriter]()
    for split, samples in parts.items():
        augmented = split == "train" and config.views > 1
        images = ImageSource(
            samples,
            preprocess,
            device,
            workers,
            config.augmentation() if augmented else "none",
            config.seed,
            pool=pool,
            decode_on=config.decode,
        )
        settings = CacheSettings(
            views=config.views if augmented else 1,
            augment=images.augment,
            seed=config.seed,
            dtype=config.feature_dtype,
            amp=str(amp_dtype),
        )
        source = cached_source(model, images, folder, settings, progress, autocast, split, writers)
        values = source.features
        if positions is not None:
            reduced = [reduce(view, source.spatial, positions) for view in values]
            values = torch.stack(reduced).half()
        values = torch.as_tensor(np.array(values) if isinstance(values, np.ndarray) else values)
        # Images without augmented views show their plain one instead.
        repeats = config.views // len(values)
        found.append(values.repeat(repeats, 1, 1, 1) if repeats > 1 else values)
        labels.append(images.labels)
    for writer in writers:
        writer.join()
    return Features(torch.cat(found, 1).to(device), np.concatenate(labels), classes, device)


def reduce(view: Any, spatial: tuple[int, ...], positions: int) -> torch.Tensor:
    """Pool the positions of one view, some images at a time: a mapped file may exceed memory."""
    parts = range(0, len(view), 256)
    return torch.cat([pooled(view[i : i + 256], spatial, positions) for i in parts])
