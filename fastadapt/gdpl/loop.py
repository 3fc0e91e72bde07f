"""The training loop of GDPL and its settings."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from fastadapt.data import Sample
from fastadapt.errors import InputError
from fastadapt.features import ImageSource
from fastadapt.gdpl.evaluate import Evaluator
from fastadapt.gdpl.model import GDPLModel
from fastadapt.trainer import learning_rate, precision


@dataclass(frozen=True)
class GDPLTrainConfig:
    """How to train. The defaults are the paper's.

    Attributes:
        shots: training images per class; 0 for all.
        train_classes: ``"base"``: train on the first half of the classes and measure both halves;
            ``"all"``: train on every class, as for transfer to other data sets.
        epochs, lr, batch_size: the learning rate rises in ``warmup_epochs`` and falls in a cosine.
        optimizer: ``"sgd"`` with momentum 0.9, or ``"adamw"``.
        weight_decay, clip_grad, warmup_epochs, amp, augment, val_fraction: as in
            :class:`fastadapt.train.TrainConfig`. The validation split is evaluated where the data
            set has no test split; it selects nothing: the last epoch is kept, as in the paper.
    """

    shots: int = 16
    train_classes: Literal["base", "all"] = "base"
    epochs: int = 15
    lr: float = 3.5e-3
    batch_size: int = 4
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    clip_grad: float | None = None
    warmup_epochs: float = 1.0
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    augment: Literal["none", "flips", "dihedral", "crops"] = "crops"
    val_fraction: float = 0.2

    def __post_init__(self):
        for name, choices in (("train_classes", ("base", "all")), ("optimizer", ("sgd", "adamw"))):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}"
                )
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("lr", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value}; expected more than 0")
        for name in ("shots", "weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more")


def train_epochs(
    model: GDPLModel,
    samples: Sequence[Sample],
    config: GDPLTrainConfig,
    evaluator: Evaluator,
    seed: int,
) -> list[dict[str, float]]:
    """Trains a model on some images; returns what was measured in each epoch.

    Every random stream follows from the seed and the epoch.

    Raises:
        InputError: the loss is no longer finite.
    """
    source = ImageSource(
        samples, evaluator.preprocess, evaluator.device, evaluator.workers, config.augment, seed
    )
    optimizer = make_optimizer(model, config)
    trained = optimizer.param_groups[0]["params"]
    fp16 = precision(config.amp, evaluator.device) == torch.float16
    scaler = torch.amp.GradScaler(evaluator.device.type, enabled=fp16)
    steps = math.ceil(len(samples) / config.batch_size)
    warmup = min(round(config.warmup_epochs * steps), config.epochs * steps)
    progress = evaluator.progress
    bar = progress.add_task(
        f"seed {seed}", total=config.epochs * len(samples), unit="images", note=""
    )
    history = []
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        rng = np.random.default_rng((seed, epoch))
        torch.manual_seed(int(rng.integers(2**63)))
        order = rng.permutation(len(samples))
        views = np.full(len(samples), 0 if config.augment == "none" else epoch)
        model.train()
        total, hits = 0.0, 0
        batches = source.batches(order, views, config.batch_size)
        for step, (images, labels) in enumerate(batches, start=1):
            lr = learning_rate((epoch - 1) * steps + step, config.epochs * steps, warmup, config.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            features = None
            if config.augment == "none":
                chosen = order[(step - 1) * config.batch_size :][: len(labels)]
                batch = [samples[i] for i in chosen]
                features = evaluator.domain_features(model, batch, images)
            with evaluator.autocast():
                logits = model(images, features)
            loss = F.cross_entropy(logits.float(), labels)
            value = loss.item()
            if not math.isfinite(value):
                raise InputError(
                    f"the loss is {value} in epoch {epoch}, step {step} of {steps}: start anew "
                    f"with a lower --lr (it is {config.lr:g}), with --clip-grad 1 or --amp off"
                )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if config.clip_grad is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(trained, config.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            total += value * len(labels)
            hits += int((logits.argmax(1) == labels).sum())
            progress.update(bar, advance=len(labels), note=f"loss {value:.3f}")
        row = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": total / len(samples),
            "train_accuracy": hits / len(samples),
            "seconds": round(time.perf_counter() - started, 3),
        }
        history.append(row)
        progress.console.print(
            f"seed {seed}  epoch {epoch:3d}  train loss {row['train_loss']:.4f}  "
            f"train accuracy {row['train_accuracy']:.2%}  {row['seconds']:.1f} s"
        )
    progress.remove_task(bar)
    return history


def make_optimizer(model: GDPLModel, config: GDPLTrainConfig) -> torch.optim.Optimizer:
    """Over everything that requires gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, momentum=0.9, **settings)
    return torch.optim.AdamW(trained, **settings)
