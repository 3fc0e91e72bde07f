"""Train GDPL: the loop over epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fastadapt.cuda_graph import LEAST_STEPS
from fastadapt.data.dataset import Sample
from fastadapt.data.images import ImageSource
from fastadapt.errors import InputError
from fastadapt.gdpl.checkpoint import trained_state
from fastadapt.gdpl.config import GDPLTrainConfig
from fastadapt.gdpl.evaluate import Evaluator
from fastadapt.gdpl.model import GDPLModel
from fastadapt.train.optimizer import copy_of
from fastadapt.train.precision import precision
from fastadapt.train.run_folder import State
from fastadapt.train.schedule import Schedule
from fastadapt.train.step import Losses, training_step


def train_epochs(
    model: GDPLModel,
    samples: Sequence[Sample],
    config: GDPLTrainConfig,
    evaluator: Evaluator,
    seed: int,
    state: State,
    save: Callable[[State], None],
) -> None:
    """Train a model on some images, continuing from ``state``.

    All random numbers of an epoch follow from the seed and the epoch, and cached domain features
    from the samples alone: a resumed run gives what the uninterrupted one would have given.

    Args:
        model: on the device.
        samples: the training images.
        config: how to train.
        evaluator: knows how images are read, and where to compute.
        seed: of everything random.
        state: epochs, weights and optimizer so far; updated in place.
        save: called after every epoch.

    Raises:
        InputError: the loss is no longer finite.
    """
    device = evaluator.device
    source = ImageSource(
        samples, evaluator.preprocess, device, evaluator.workers, config.augmentation(), seed
    )
    # Images without augmentation have the same features in every epoch; random views do not.
    plain = not config.augments or evaluator.table is not None
    features = evaluator.domain_features(model, samples) if plain else None
    optimizer = make_optimizer(model, config)
    fp16 = precision(config.amp, device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    if state.epoch:
        model.load_state_dict(state.model, strict=False)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state.optimizer})
        if state.scaler:
            scaler.load_state_dict(state.scaler)
    size = config.batch_size
    count = len(samples)
    if config.drop_last and count >= size:
        count = count // size * size
    steps = math.ceil(count / size)
    plan = Schedule(config.schedule, config.lr, config.epochs, steps, config.warmup_epochs)
    progress = evaluator.progress
    take_step = training_step(
        model,
        optimizer,
        evaluator.autocast,
        scaler=scaler,
        clip_grad=config.clip_grad,
        graph=config.cuda_graph == "auto"
        and (config.epochs - state.epoch) * (len(samples) // size) >= LEAST_STEPS,
        say=partial(progress.console.print, markup=False),
    )

    def check_finite(epoch: int, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} in epoch {epoch}, step {step} of {steps}: start anew with a "
                f"lower `lr` (it is {config.lr:g}), with `clip_grad=1` or `amp='off'`"
            )

    bar = progress.add_task(
        f"seed {seed}",
        total=config.epochs * count,
        completed=state.epoch * count,
        unit="images",
        note="",
    )
    for epoch in range(state.epoch + 1, config.epochs + 1):
        started = time.perf_counter()
        rng = np.random.default_rng((seed, epoch))
        torch.manual_seed(int(rng.integers(2**63)))
        order = rng.permutation(len(samples))[:count]
        views = np.full(len(samples), epoch if config.augments else 0)
        rows = torch.from_numpy(order).to(device)
        losses = Losses(partial(check_finite, epoch))
        hits = torch.zeros((), dtype=torch.long, device=device)
        model.train()
        batches = source.batches(order, views, size)
        for step, (images, labels) in enumerate(batches, start=1):
            lr = plan.rate((epoch - 1) * steps + step)
            batch = rows[(step - 1) * size : step * size]
            known = () if features is None else (features.index_select(0, batch),)
            loss, right = take_step(lr, labels, images, *known)
            losses.add(loss, len(labels))
            hits += right
            progress.update(bar, advance=len(labels), note=losses.note)
        state.epoch = epoch
        state.history.append(
            {
                "epoch": epoch,
                "lr": lr,
                "train_loss": losses.total() / count,
                "train_accuracy": int(hits) / count,
                "seconds": round(time.perf_counter() - started, 3),
            }
        )
        state.model = copy_of(trained_state(model))
        state.optimizer = optimizer.state_dict()["state"]
        state.scaler = scaler.state_dict()
        save(state)
        row = state.history[-1]
        progress.console.print(
            f"seed {seed}  epoch {epoch:3d}  train loss {row['train_loss']:.4f}  "
            f"train accuracy {row['train_accuracy']:.2%}  {row['seconds']:.1f} s"
        )
    progress.remove_task(bar)


def make_optimizer(model: GDPLModel, config: GDPLTrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters that require gradients, fused on a GPU."""
    trained = [p for p in model.parameters() if p.requires_grad]
    settings: Any = {"lr": config.lr, "weight_decay": config.weight_decay}
    settings["fused"] = True if trained[0].is_cuda else None
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, momentum=0.9, **settings)
    return torch.optim.AdamW(trained, **settings)
