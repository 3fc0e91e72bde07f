"""Say before the work begins how much time, memory and disk it will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.data.dataset import Dataset
from fastadapt.train.config import TrainConfig
from fastadapt.train.feature_cache import size_text

BACKWARD = 2.0  # times a forward pass
CALLS, LONGEST = 3, 0.5  # of a measurement: calls, and seconds after which no other begins
TRAINED_BYTES = 16  # of a parameter that trains: itself, its gradient, two moments, in fp32


class Work(NamedTuple):
    """What a run has to do.

    Attributes:
        features: images of which features are computed once, views counted.
        trained: training images of an epoch.
        validated: images of a validation.
        kept: bytes of the images that are kept decoded.
    """

    features: int
    trained: int
    validated: int
    kept: int

    @classmethod
    def of(cls, dataset: Dataset, config: TrainConfig, cached: bool, kept: int) -> Work:
        """Return the work of a run.

        Args:
            dataset: whose images.
            config: of the run.
            cached: whether stage 1 trains on cached features.
            kept: see the class.
        """
        trained = len(dataset.split("train"))
        viewed = trained + config.refit * len(dataset.split("val"))
        features = len(dataset.samples) + viewed * (config.views - 1) if cached else 0
        return cls(features, trained, len(dataset.split("val")), kept)


def estimate_line(
    model: AdaptedModel,
    config: TrainConfig,
    work: Work,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager],
) -> str | None:
    """Return a line about time, memory and disk; ``None`` where a batch does not fit.

    The time is that of a forward pass, measured, times what is to be done, decoding apart; captured
    steps on a GPU take less.

    Args:
        model: on its device.
        config: how to train.
        work: what is to be done.
        batch_size: of the forward pass that is measured.
        autocast: makes the context of the forward pass.
    """
    try:
        backbone, adapter = forward_seconds(model, batch_size, autocast)
    except torch.OutOfMemoryError:
        return None
    cached = work.features > 0
    seconds = seconds_needed(work, config, backbone, adapter, cached)
    pooled = config.full or isinstance(model.adapter, nn.Identity)
    values = (1 if pooled else model.spec.num_tokens) * model.spec.dim
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if config.stages == 2 or config.full:
        trained += sum(p.numel() for p in model.backbone.parameters())
    memory = work.kept + TRAINED_BYTES * trained
    disk = 2 * values * work.features + TRAINED_BYTES * trained
    return (
        f"estimate: about {duration_text(seconds)} after decoding, {size_text(memory)} of memory "
        f"for images and weights, {size_text(disk)} of disk"
    )


def seconds_needed(
    work: Work, config: TrainConfig, backbone: float, adapter: float, cached: bool
) -> float:
    """Return the seconds of all epochs, decoding and start apart.

    Args:
        work: what has to be done.
        config: epochs and stages.
        backbone: seconds that the backbone takes for an image, forward.
        adapter: likewise adapter and head.
        cached: whether stage 1 trains on cached features.
    """
    passes = [(work.trained, work.validated)]  # images that train, and that validate
    if config.refit:
        passes.append((work.trained + work.validated, 0))
    step, both, total = 1 + BACKWARD, backbone + adapter, work.features * backbone
    for trained, validated in passes:
        epoch = trained * step * adapter + validated * adapter
        if not cached or config.full:
            frozen = backbone * (step if config.full else 1)
            epoch = trained * (frozen + step * adapter) + validated * both
        total += config.epochs * epoch
        if config.stages == 2:
            total += config.epochs2 * (trained * step + validated) * both
    return total


def forward_seconds(
    model: AdaptedModel, batch_size: int, autocast: Callable[[], AbstractContextManager]
) -> tuple[float, float]:
    """Measure a forward pass of the backbone, and of adapter and head.

    Returns:
        Seconds for an image of each.
    """
    device = next(model.parameters()).device
    images = torch.zeros(batch_size, *model.spec.input_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast():
            features = model.backbone_features(images)  # plans and libraries
            backbone = _seconds(device, lambda: model.backbone_features(images))
            model.classify_features(features)
            adapter = _seconds(device, lambda: model.classify_features(features))
    finally:
        model.train(training)
    return backbone / batch_size, adapter / batch_size


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Return the shortest time of a few calls: on a busy machine most take far longer."""
    found: list[float] = []
    while len(found) < CALLS and sum(found) < LONGEST:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)


def duration_text(seconds: float) -> str:
    """Return a duration as people say it, coarsely."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
