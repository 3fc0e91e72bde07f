"""The training loop: stages, epochs, validation, and a state after every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress, TaskID
from torch import Tensor

from fastadapt.adapted_model import AdaptedModel
from fastadapt.checkpoint import trained_state
from fastadapt.cuda_graph import LEAST_STEPS
from fastadapt.data.dataset import Dataset
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.train.config import TrainConfig
from fastadapt.train.metrics import classification_metrics
from fastadapt.train.run_folder import CACHE, STATE, State, save_state, write_metrics
from fastadapt.train.sources import CacheSettings, FeatureSource, ImageSource, Source, cached_source
from fastadapt.train.step import Losses, training_step


@dataclass
class Trainer:
    """One run. :meth:`run` trains from ``state`` on; :meth:`evaluate` measures.

    Attributes:
        model: adapted; its backbone frozen.
        dataset, preprocess: the images, and how they are read.
        config: how to train.
        settings: everything that a resumed run must have in common with this one.
        state: where the run stands; kept up to date, and saved to ``out`` after every epoch.
        out: the run folder.
        device: where to compute.
        workers: threads that read images.
        cached: whether stage 1 trains on cached features.
        progress: bars and lines.
    """

    model: AdaptedModel
    dataset: Dataset
    preprocess: Preprocess
    config: TrainConfig
    settings: dict[str, Any]
    state: State
    out: Path
    device: torch.device
    workers: int
    cached: bool
    progress: Progress

    def __post_init__(self):
        self.amp_dtype = precision(self.config.amp, self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype == torch.float16
        )
        # Convolutions on a CPU are several times as fast with channels last.
        self.model.to(self.device).to(memory_format=torch.channels_last)
        self._sources: dict[tuple[str, bool], Source] = {}

    def run(self) -> None:
        """Trains what is left of all stages."""
        for stage in range(self.state.stage, self.config.stages + 1):
            self._run_stage(stage)

    def load_best(self) -> None:
        """Gives the model the weights of the epoch that was kept."""
        self.model.load_state_dict(self.state.best_model, strict=False)

    def evaluate(self, split: str) -> dict[str, Any]:
        """Loss (with the class weights, without label smoothing) and metrics on a split."""
        source = self._source(split)
        order = np.arange(len(source.labels))
        _, _, batch_size = self.config.of_stage(self.state.stage)
        self.model.eval()
        with torch.inference_mode():
            logits = []
            for inputs, _ in source.batches(order, None, batch_size):
                with self._autocast():
                    logits.append(source.logits(self.model, inputs).float().cpu())
            logits = torch.cat(logits)
            labels = torch.from_numpy(source.labels)
            loss = F.cross_entropy(logits, labels, weight=self._class_weights()).item()
        predictions = logits.argmax(1).numpy()
        metrics = classification_metrics(source.labels, predictions, self.dataset.classes)
        return {"loss": loss, **metrics}

    def remove_unused_caches(self) -> None:
        """Features that an earlier run in the same folder computed with other settings."""
        sources = self._sources.values()
        used = {
            Path(s.features.filename).resolve() for s in sources if isinstance(s, FeatureSource)
        }
        if self.cached and not used:
            return  # resumed in stage 2: stage 1's are unknown here
        for path in (self.out / CACHE).glob("*.npy"):
            if path.resolve() not in used:
                path.unlink()

    def _run_stage(self, stage: int) -> None:
        state, config = self.state, self.config
        epochs, _, _ = config.of_stage(stage)
        resumed = state.stage == stage and state.epoch > 0
        if stage == 2:
            if not resumed:
                self.load_best()
            self.model.unfreeze()
        optimizer = make_optimizer(self.model, config)
        if resumed:
            self.model.load_state_dict(state.model, strict=False)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state.optimizer})
            if state.scaler:
                self.scaler.load_state_dict(state.scaler)
        elif stage == 2:
            state.stage, state.epoch = 2, 0
            # The kept weights get the backbone too, which stage 2 is about to change.
            state.best_model = copy_of(trained_state(self.model))
        for split in ("val", "test"):
            if self.dataset.split(split):
                self._source(split)  # its features are computed now, not after an epoch
        count = len(self._source("train").labels)
        step = self._training_step(optimizer)
        task = self.progress.add_task(
            f"stage {stage}",
            total=epochs * count,
            completed=state.epoch * count,
            unit="images",
            note="",
        )
        while state.epoch < epochs and not self._stalled():
            started = time.perf_counter()
            row = {"stage": stage, "epoch": state.epoch + 1}
            row |= self._train_epoch(row["epoch"], step, task)
            measured = self.evaluate("val")
            self._check_finite(measured["loss"], row["epoch"], "validation")
            row |= {f"val_{key}": measured[key] for key in ("loss", "accuracy", "macro_f1")}
            row["seconds"] = round(time.perf_counter() - started, 3)
            self._complete_epoch(row, optimizer)
        self.progress.remove_task(task)

    def _training_step(self, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
        """For the present stage."""
        config, source = self.config, self._source("train")
        epochs, _, batch_size = config.of_stage(self.state.stage)
        steps = (epochs - self.state.epoch) * (len(source.labels) // batch_size)
        weights = self._class_weights()
        return training_step(
            lambda inputs: source.logits(self.model, inputs),
            optimizer,
            self._autocast,
            scaler=self.scaler,
            class_weights=None if weights is None else weights.to(self.device),
            label_smoothing=config.label_smoothing,
            clip_grad=config.clip_grad,
            graph=config.cuda_graph == "auto" and steps >= LEAST_STEPS,
            say=partial(self.progress.console.print, markup=False),
        )

    def _train_epoch(
        self, epoch: int, take_step: Callable[..., Any], task: TaskID
    ) -> dict[str, float]:
        """One pass over the training split; the last learning rate and the mean loss."""
        config, stage, source = self.config, self.state.stage, self._source("train")
        epochs, peak, batch_size = config.of_stage(stage)
        count = len(source.labels)

        # Every random stream of an epoch follows from these numbers: there is no state to save.
        rng = np.random.default_rng((config.seed, stage, epoch))
        torch.manual_seed(int(rng.integers(2**63)))
        order = rng.permutation(count)
        if source.num_views is None:
            views = np.full(count, len(self.state.history) + 1)
        else:
            views = rng.integers(source.num_views, size=count)
        if count > batch_size > 1 and count % batch_size == 1:
            order = order[:-1]  # a batch of one image has no batch statistics

        steps = math.ceil(len(order) / batch_size)
        warmup = min(round(config.warmup_epochs * steps), epochs * steps)
        losses = Losses(
            lambda loss, step: self._check_finite(loss, epoch, f"step {step} of {steps}")
        )
        self.progress.update(task, description=f"stage {stage}, epoch {epoch} of {epochs}")
        self.model.train()
        for step, (inputs, labels) in enumerate(source.batches(order, views, batch_size), start=1):
            lr = learning_rate((epoch - 1) * steps + step, epochs * steps, warmup, peak)
            loss, _ = take_step(lr, labels, inputs)
            losses.add(loss, len(labels))
            self.progress.update(task, advance=len(labels), note=losses.note)
        return {"lr": lr, "train_loss": losses.total() / len(order)}

    def _complete_epoch(self, row: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Notes the epoch, keeps its weights if they are the best, and saves the state."""
        state, key = self.state, f"val_{self.config.select}"
        state.epoch = row["epoch"]
        state.history.append(row)
        state.model = copy_of(trained_state(self.model))
        state.optimizer = optimizer.state_dict()["state"]
        state.scaler = self.scaler.state_dict()
        sign = -1 if self.config.select == "loss" else 1
        best = None if state.best is None else state.history[state.best][key]
        improved = best is None or sign * row[key] > sign * best
        if improved:
            state.best = len(state.history) - 1
            state.best_model = state.model
        save_state(state, self.settings, self.out / STATE)
        write_metrics(self.out, state.history)
        self.progress.console.print(
            f"stage {row['stage']}  epoch {row['epoch']:3d}  train loss {row['train_loss']:.4f}  "
            f"val loss {row['val_loss']:.4f}  accuracy {row['val_accuracy']:.2%}  "
            f"macro-F1 {row['val_macro_f1']:.4f}  {row['seconds']:.1f} s{'  *' if improved else ''}"
        )

    def _stalled(self) -> bool:
        """Whether the stage had ``patience`` epochs without improvement."""
        state, patience = self.state, self.config.patience
        if patience is None or state.best is None:
            return False
        return min(len(state.history) - 1 - state.best, state.epoch) >= patience

    def _source(self, split: str) -> Source:
        """A split for the present stage; made once."""
        cached = self.cached and self.state.stage == 1
        if (split, cached) not in self._sources:
            self._sources[split, cached] = self._make_source(split, cached)
        return self._sources[split, cached]

    def _make_source(self, split: str, cached: bool) -> Source:
        config = self.config
        augment = config.augment if split == "train" else "none"
        images = ImageSource(
            self.dataset.split(split),
            self.preprocess,
            self.device,
            self.workers,
            augment,
            config.seed,
        )
        if not cached:
            return images
        settings = CacheSettings(
            views=config.views if split == "train" else 1,
            augment=augment,
            seed=config.seed,
            dtype=config.feature_dtype,
            amp=str(self.amp_dtype),
        )
        return cached_source(
            self.model, images, self.out / CACHE, settings, self.progress, self._autocast, split
        )

    def _autocast(self):
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def _class_weights(self) -> Tensor | None:
        """[num_classes], mean 1 over the training images; None without weighting."""
        if self.config.class_weights == "none":
            return None
        labels = [sample.label for sample in self.dataset.split("train")]
        counts = torch.bincount(torch.tensor(labels), minlength=len(self.dataset.classes))
        return len(labels) / (len(counts) * counts.float())

    def _check_finite(self, loss: float, epoch: int, where: str) -> None:
        if math.isfinite(loss):
            return
        stage, option = self.state.stage, "lr" if self.state.stage == 1 else "lr2"
        _, peak, _ = self.config.of_stage(stage)
        kept = f"{STATE} keeps the epoch before" if self.state.history else "no epoch was completed"
        raise InputError(
            f"the loss is {loss} in stage {stage}, epoch {epoch}, {where}: start anew with a lower "
            f"`{option}` (it is {peak:g}), with `clip_grad=1`, or with `amp='off'`; {kept}"
        )


def precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype for autocast; None for full precision. Raises InputError for fp16 on a CPU."""
    if amp == "off" or (amp == "auto" and device.type == "cpu"):
        return None
    if amp == "fp16" and device.type == "cpu":
        raise InputError("amp is 'fp16', which needs a GPU: give `amp='bf16'` or off")
    if amp == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def make_optimizer(model: AdaptedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Over everything that requires gradients; vectors (biases, norms) without weight decay.

    On a GPU in one kernel.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, fused=True if trained[0].is_cuda else None)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear from 0 to ``peak`` at step ``warmup``, then a cosine to 0 at step ``steps``.

    Args:
        step: from 1.
    """
    if step <= warmup:
        return peak * step / warmup
    # Steps count from 1, so that no step is lost to a learning rate of 0: not even the last.
    done = (step - 1 - warmup) / max(steps - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def copy_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, where further training leaves it alone."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
