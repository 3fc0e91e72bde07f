"""Train the trainable part many times on cached features: the engine of search and of benchmarks.

A :class:`Trial` holds one model, its optimizer and one step. Every run draws the parameters anew
and zeroes the optimizer's state in place, so that a CUDA graph which was captured once serves all
folds. Batches, schedule and step are those of stage 1 of :class:`fastadapt.train.loop.Trainer`; the
model of the last epoch is judged, so that nothing is chosen on the images that judge it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.backbones import Backbone, FeatureSpec
from fastadapt.config import AdaptConfig
from fastadapt.cuda_graph import LEAST_STEPS
from fastadapt.errors import InputError
from fastadapt.train.average import WeightAverage
from fastadapt.train.config import TrainConfig
from fastadapt.train.metrics import classification_metrics
from fastadapt.train.mixing import make_mix
from fastadapt.train.optimizer import make_optimizer
from fastadapt.train.precision import precision
from fastadapt.train.schedule import Schedule
from fastadapt.train.sources import FeatureSource, logits_of_cached, padded
from fastadapt.train.step import Losses, training_step

EVALUATION_BATCH_SIZE = 128


@dataclass(frozen=True)
class Features:
    """Cached features of a data set, as trials take them.

    Attributes:
        values: [views, n, tokens, C] fp16 or fp32, the plain view first: a tensor on the device
            that trains, or an array, in memory or mapped from a file.
        labels: [n] int64, indices into ``classes``.
        classes: names.
        device: where to compute.
    """

    values: Tensor | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    device: torch.device

    @property
    def spec(self) -> FeatureSpec:
        """What the features look like to a model."""
        tokens, dim = self.values.shape[2:]
        return FeatureSpec(dim, "tokens", 0, tokens, (3, 1, 1))

    def to(self, device: torch.device) -> Features:
        """Return the features for another device; on a CPU the same, where they are there."""
        values = self.values
        if device.type == "cuda":
            values = torch.as_tensor(np.array(values) if isinstance(values, np.ndarray) else values)
            values = values.to(device)
        return replace(self, values=values, device=device)

    def stored(self) -> Features:
        """Return the features as an array in memory, which other processes can be given."""
        values = self.values
        if isinstance(values, Tensor):
            values = values.cpu().numpy()
        return replace(self, values=values, device=torch.device("cpu"))

    def source(self, views: int) -> FeatureSource:
        """Return batches of the first ``views`` views."""
        return FeatureSource(self.values[:views], self.labels, self.device)


def without_backbone(spec: FeatureSpec, config: AdaptConfig, classes: int) -> AdaptedModel:
    """Return adapter and head alone, as a model that takes the backbone's features for images.

    Args:
        spec: of the features.
        config: of the adapter; low-rank adapters inside a backbone have no place here.
        classes: their number.

    Raises:
        InputError: the configuration has low-rank adapters.
    """
    if config.lora is not None:
        raise InputError(
            "low-rank adapters change the features, so that no cached ones serve: leave LoRA out"
        )
    source = {"kind": "module", "name": "features"}
    backbone = Backbone(nn.Identity(), {}, lambda module, x: x, spec, source)
    return AdaptedModel(backbone, config, classes)


class Trial:
    """One setting of adapter and training, to be run on several folds.

    Args:
        features: of the data set.
        config: how to train; stage 1 of it.
        adapt_config: what is trained.
        build: makes the model; adapter and head as configured if ``None``.
    """

    def __init__(
        self,
        features: Features,
        config: TrainConfig,
        adapt_config: AdaptConfig | None = None,
        *,
        build: Callable[[], AdaptedModel] | None = None,
    ):
        adapt_config = adapt_config or AdaptConfig()
        self.features, self.config = features, config
        self._build = build or partial(
            without_backbone, features.spec, adapt_config, len(features.classes)
        )
        self._source = features.source(max(config.views, 1))
        self._device = features.device
        self.amp_dtype = precision(config.amp, self._device)
        self.model = self._new_model(0).to(self._device)
        self._optimizer = make_optimizer(self.model, config)
        self._mix = make_mix(config.mixup, 0.0, len(features.classes), images=False)
        self._average: WeightAverage | None = None
        self._step: Callable[..., tuple[Tensor, Tensor]] | None = None

    def run(
        self, train: np.ndarray, held_out: np.ndarray, seed: int, epochs: int | None = None
    ) -> Tensor:
        """Train on some images, and return the logits of others.

        Args:
            train: places of the images to train on.
            held_out: places of the images to predict.
            seed: of the parameters, the order of the images and their views.
            epochs: to train; the configuration's if ``None``. The learning rate's schedule stays.

        Returns:
            [len(held_out), classes] fp32, on the CPU.

        Raises:
            InputError: the loss is no longer finite.
        """
        for _ in self.epochs(train, seed, epochs):
            pass
        return self.predict(held_out)

    def epochs(self, train: np.ndarray, seed: int, epochs: int | None = None) -> Iterator[int]:
        """Train anew; yield the number of each epoch that is done, for :meth:`predict` in between.

        Args:
            train, seed, epochs: as for :meth:`run`.
        """
        self._restart(seed)
        for epoch in range(1, (epochs or self.config.epochs) + 1):
            self._train_epoch(train, seed, epoch)
            yield epoch

    def predict(self, places: np.ndarray) -> Tensor:
        """Return logits of the plain views, [len(places), classes] fp32, on the CPU."""
        self.model.eval()
        found = []
        averaged = nullcontext() if self._average is None else self._average.applied()
        with averaged, torch.inference_mode():
            for inputs, _ in self._source.batches(places, None, EVALUATION_BATCH_SIZE):
                with self._autocast():
                    found.append(logits_of_cached(self.model, inputs).float())
        return torch.cat(found).cpu()

    def _restart(self, seed: int) -> None:
        """Draw the parameters anew and forget the optimizer's state, in the tensors they are in."""
        new = self._new_model(seed)
        with torch.no_grad():
            for name, value in new.state_dict().items():
                self.model.state_dict()[name].copy_(value)
            for values in self._optimizer.state.values():
                for value in values.values():
                    if isinstance(value, Tensor):
                        value.zero_()
        if self.config.ema:
            self._average = WeightAverage(self.model, self.config.ema)

    def _new_model(self, seed: int) -> AdaptedModel:
        torch.manual_seed(seed)
        return self._build()

    def _train_epoch(self, train: np.ndarray, seed: int, epoch: int) -> None:
        config, count = self.config, len(train)
        rng = np.random.default_rng((seed, 1, epoch))
        torch.manual_seed(int(rng.integers(2**63)))
        order = train[rng.permutation(count)]
        views = rng.integers(len(self._source.features), size=len(self._source.labels))
        rest = count % config.batch_size
        if count > config.batch_size > 1 and (rest == 1 or config.drop_last):
            order = order[: count - rest]
        steps = math.ceil(len(order) / config.batch_size)
        plan = Schedule(config.schedule, config.lr, config.epochs, steps, config.warmup_epochs)
        if self._step is None:
            self._step = self._make_step(plan.total)
        losses = Losses(self._check_finite)
        self.model.train()
        pad = config.batch_size if self._device.type == "cuda" and steps > 1 else 0
        batches = self._source.batches(order, views, config.batch_size)
        for step, (inputs, labels) in enumerate(batches, start=1):
            number, taken = (epoch - 1) * steps + step, len(labels)
            if self._mix is not None:
                inputs, labels = self._mix(inputs, labels)
            loss, _ = self._step(plan.rate(number), *reversed(padded(inputs, labels, pad)))
            if self._average is not None:
                self._average.update(number)
            losses.add(loss, taken)
        losses.total()

    def _make_step(self, steps: int) -> Callable[..., tuple[Tensor, Tensor]]:
        config, weights = self.config, None
        if config.class_weights == "balanced":
            counts = np.bincount(self.features.labels, minlength=len(self.features.classes))
            weights = torch.from_numpy(len(self.features.labels) / (len(counts) * counts)).float()
            weights = weights.to(self._device)
        return training_step(
            lambda inputs: logits_of_cached(self.model, inputs),
            self._optimizer,
            self._autocast,
            class_weights=weights,
            label_smoothing=config.label_smoothing,
            clip_grad=config.clip_grad,
            graph=config.cuda_graph == "auto" and steps >= LEAST_STEPS,
        )

    def _autocast(self) -> AbstractContextManager:
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self.amp_dtype)

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} at step {step} of an epoch: give a lower `lr` "
                f"(it is {self.config.lr:g})"
            )


def pooled(values: np.ndarray | Tensor, spatial: tuple[int, ...], most: int) -> Tensor:
    """Average neighbouring positions until few are left, so that a trial costs less.

    Args:
        values: [n, positions, C].
        spatial: the shape of the positions; empty for tokens, taken as a square if they are one.
        most: the number of positions to keep at most.

    Returns:
        [n, at most ``most``, C] fp32; fewer dimensions of positions are never mixed up.
    """
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.array(values))  # a mapped file is not writable
    positions = values.shape[1]
    if positions <= most:
        return values.float()
    root = math.isqrt(positions)
    shape = spatial or ((root, root) if root * root == positions else (positions,))
    side = int(most ** (1 / len(shape)) + 1e-9)
    if len(shape) > 3 or side < 1:
        return values.float().mean(1, keepdim=True)
    grid = tuple(min(side, size) for size in shape)
    x = values.float().transpose(1, 2).unflatten(2, shape)
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[len(shape) - 1]
    return pool(grid)(x).flatten(2).transpose(1, 2)


def score_of(logits: Tensor, labels: np.ndarray, classes: tuple[str, ...], metric: str) -> float:
    """Return a score that is better when larger: accuracy, macro-F1, or the negative loss.

    Args:
        logits: [N, K].
        labels: [N].
        classes: K names.
        metric: ``"accuracy"``, ``"macro_f1"`` or ``"loss"``.
    """
    if metric == "loss":
        return -nn.functional.cross_entropy(logits, torch.from_numpy(labels)).item()
    return classification_metrics(labels, logits.argmax(1).numpy(), classes)[metric]
