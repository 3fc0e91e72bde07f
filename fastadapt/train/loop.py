"""Train in stages and epochs, validate, and keep the state that a run resumes from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
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
from fastadapt.data.decode_pool import DecodePool
from fastadapt.data.images import ImageSource
from fastadapt.data.preprocess import Preprocess
from fastadapt.processes import ALONE, Processes
from fastadapt.train.average import WeightAverage
from fastadapt.train.checks import check_finite, class_weights, samples_are_independent
from fastadapt.train.config import TrainConfig
from fastadapt.train.estimate import Work, estimate_line
from fastadapt.train.evaluations import Evaluations
from fastadapt.train.feature_cache import (
    GPU_BATCH_SIZE,
    CacheSettings,
    CacheWriter,
    Extraction,
    as_tokens,
    cached_source,
    size_text,
)
from fastadapt.train.halving import halving
from fastadapt.train.imports_ahead import import_ahead
from fastadapt.train.metrics import classification_metrics
from fastadapt.train.mixing import make_mix
from fastadapt.train.optimizer import copy_of, make_optimizer
from fastadapt.train.phases import Phases
from fastadapt.train.precision import precision
from fastadapt.train.refit import InitialWeights
from fastadapt.train.results import epoch_line
from fastadapt.train.run_folder import (
    CACHE,
    STATE,
    State,
    append_metrics,
    save_state,
    write_metrics,
)
from fastadapt.train.schedule import Schedule
from fastadapt.train.selection import better, stalled
from fastadapt.train.shared_sources import SharedSources
from fastadapt.train.sources import PADDING, FeatureSource, Source, logits_of, padded
from fastadapt.train.split_sources import REFITTED, SplitSources
from fastadapt.train.state_saver import StateSaver
from fastadapt.train.step import Losses, training_step

# Of validation, where a GPU is: samples are independent, so that the size is free.
EVALUATION_BATCH_SIZE = 64


@dataclass
class Trainer:
    """One run. :meth:`run` trains from ``state`` on; :meth:`evaluate` measures.

    Attributes:
        model: adapted; its backbone frozen.
        dataset, preprocess: the images, and how they are read.
        config: how to train.
        settings: everything that a resumed run must have in common with this one.
        state: where the run stands; kept up to date, and saved to ``out``.
        out: the run folder.
        device: where to compute.
        workers: processes that decode images.
        cached: whether stage 1 trains on cached features.
        progress: bars and lines.
        save_every: least seconds between two states on disk; 0 for one after every epoch.
        pool: processes that decode; closed as soon as all images are kept decoded.
        phases: where the seconds are counted.
        shared: features and images of a whole data set, of which the splits are taken.
        processes: that train together.
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
    save_every: float = 0.0
    pool: DecodePool | None = None
    phases: Phases = field(default_factory=Phases)
    shared: SharedSources | None = None
    processes: Processes = ALONE

    def __post_init__(self):
        self.amp_dtype = precision(self.config.amp, self.device)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.amp_dtype == torch.float16
        )
        # Convolutions on a CPU are several times as fast with channels last.
        self.model.to(self.device).to(memory_format=torch.channels_last)
        self._sources = SplitSources(
            self.dataset,
            self.preprocess,
            self.config,
            self.device,
            self.workers,
            str(self.amp_dtype),
            partial(self.phases, "decode"),
            pool=self.pool,
            shared=self.shared,
            processes=self.processes,
        )
        self._average: WeightAverage | None = None
        self._say = partial(self.progress.console.print, markup=False)
        self._evaluations = Evaluations(self.config, self._autocast, self._say)
        self._wrote_metrics = False
        self._writers: list[CacheWriter] = []
        self._saver = StateSaver(self._save, self.save_every)
        self.processes.if_stuck(self._saver.flush)

    def run(self) -> None:
        """Train what is left of all stages, and of the refit where one is asked for."""
        self._prepare()
        if self.config.refit and not self.state.refit:
            initial = InitialWeights.of(self.model, self.config)
            self._run_stages()
            self._begin_refit(initial)
        self._run_stages()

    def _run_stages(self) -> None:
        for stage in range(self.state.stage, self.config.stages + 1):
            with self.phases(f"stage{stage}"):
                self._run_stage(stage)

    def _begin_refit(self, initial: InitialWeights) -> None:
        """Keep what the model gives for images that it has not seen, and go back to the start."""
        self.load_best()
        splits = [split for split in self._sources.splits if split != "train"]
        logits = {split: self.final_logits(split) for split in splits}
        self.state = State(
            refit=True,
            held_out=logits,
            held_out_history=self.state.history,
            held_out_best=self.state.best,
        )
        initial.restore(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self._evaluations = Evaluations(self.config, self._autocast, self._say)

    def save(self) -> None:
        """Write the newest state, if it is not on disk. Only the first process has one."""
        with self.phases("saving"):
            self._saver.flush()

    def _prepare(self) -> None:
        """Compute features and decode images, as far as the stages to come need them."""
        first, again = self.state.stage, self.config.refit and not self.state.refit
        sources = self._sources
        images_train = not self.cached or self.config.stages == 2
        if first == 1 and self.state.epoch == 0 and not self.progress.console.quiet:
            self._estimate(images_train)
        if self.cached and (first == 1 or again):
            many = len(self.dataset.samples) >= LEAST_STEPS * GPU_BATCH_SIZE
            extraction = Extraction(
                self.model,
                self._autocast,
                graph=many and self.config.cuda_graph == "auto",
                say=self._say,
            )
            sources.cache(partial(self._cached_features, extraction))
            extraction.close()
        if images_train:
            kept = [sources.decode(split) for split in sources.wholes]
            if not all(kept):
                total = size_text(sources.needed_bytes())
                self._say(f"images are decoded in every epoch: {total} is too much to keep")
                return
        elif self.model.config.tta != "none":  # the final evaluation sees images
            for split in sources.splits[1:]:
                sources.images(split).decode()
        if self.pool is not None:
            self.pool.close()  # nothing is decoded from here on

    def _estimate(self, images_train: bool) -> None:
        """Say how much time, memory and disk the run takes."""
        kept = self._sources.needed_bytes() if images_train else 0
        work = Work.of(self.dataset, self.config, self.cached, kept)
        size = GPU_BATCH_SIZE if self.device.type == "cuda" else 2
        if line := estimate_line(self.model, self.config, work, size, self._autocast):
            self._say(line)

    def load_best(self) -> None:
        """Give the model the weights of the epoch that was kept."""
        self.model.load_state_dict(self.state.best_model, strict=False)

    def evaluate(self, split: str) -> dict[str, Any]:
        """Return loss (with class weights, without label smoothing) and metrics on a split."""
        logits, source = self.predict(split), self._source(split)
        predictions = logits.argmax(1).numpy()
        metrics = classification_metrics(source.labels, predictions, self.dataset.classes)
        return {"loss": self.loss(split, logits), **metrics}

    def final_logits(self, split: str) -> Tensor:
        """Return what :meth:`predict` does, with test-time augmentation if the model has it."""
        plain = self.model.config.tta == "none"
        return self.predict(split, None if plain else self._sources.images(split))

    def predict(self, split: str, source: Source | None = None) -> Tensor:
        """Return logits [N, num_classes] fp32, on the CPU, of the images of a split.

        Args:
            split: its name.
            source: of its images; that of the present stage if None, which may be cached features.
        """
        source = source or self._source(split)
        count = len(source.labels)
        share = self.processes.share(np.arange(count), count)
        _, _, batch_size = self.config.of_stage(self.state.stage)
        if self.device.type == "cuda":
            batch_size = max(batch_size, EVALUATION_BATCH_SIZE)
        self.model.eval()
        stage, images = self.state.stage, isinstance(source, ImageSource)
        logits, batches = partial(logits_of, self.model, source), math.ceil(count / batch_size)
        forward = self._evaluations.step(stage, images, logits, batches)
        with torch.no_grad():
            parts = []
            for inputs, labels in source.batches(share.order, None, batch_size):
                if self.device.type == "cuda":  # libraries plan for each size that they meet
                    inputs, _ = padded(inputs, labels, batch_size)
                parts.append(forward(inputs))
            return self.processes.gather_rows(torch.cat(parts), share.rows[0]).cpu()

    def pooled_features(self, split: str) -> np.ndarray:
        """Return the means of the backbone's features of plain images [n, C], as it is now."""
        source, parts = self._sources.images(split), []
        batch_size = max(self.config.batch_size, EVALUATION_BATCH_SIZE)
        count = len(source.labels)
        share = self.processes.share(np.arange(count), count)
        self.model.eval()
        with torch.inference_mode():
            for images, _ in source.batches(share.order, None, batch_size):
                with self._autocast():
                    features = as_tokens(self.model, self.model.backbone_features(images))
                parts.append(features.float().mean(1))
            return self.processes.gather_rows(torch.cat(parts), share.rows[0]).cpu().numpy()

    @property
    def features(self) -> dict[str, FeatureSource]:
        """The cached features by split; empty where nothing is cached, or not needed any more."""
        found = self._sources.features
        return {split: found[split] for split in self._sources.splits if split in found}

    def loss(self, split: str, logits: Tensor) -> float:
        """Return the loss of logits on a split, with class weights, without label smoothing."""
        labels = torch.from_numpy(self._source(split).labels)
        trained = np.array([sample.label for sample in self.dataset.split("train")])
        return F.cross_entropy(
            logits, labels, weight=class_weights(trained, self.dataset, self.config)
        ).item()

    def finish(self) -> None:
        """Drop the state, which the results replace, and wait for caches that are being written."""
        self._saver.drop()
        for writer in self._writers:
            writer.join()
            if writer.problem is not None:
                self._say(f"the features are not kept: {writer.problem}")

    def remove_unused_caches(self) -> None:
        """Remove features that an earlier run in the folder computed with other settings."""
        if not self.cached or self._sources.features:  # else resumed in stage 2: 1's are unknown
            self._sources.remove_other_caches(self.out / CACHE)

    def _run_stage(self, stage: int) -> None:
        state, config = self.state, self.config
        epochs, _, _ = config.of_stage(stage)
        resumed = state.stage == stage and state.epoch > 0
        if stage == 2 and not resumed:
            self.load_best()
        if stage == 2 or config.full:
            self.model.unfreeze(config.unfreeze_last)
        self.processes.copy_from_first(trained_state(self.model).values())
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
        self._average = None
        if config.ema:
            self._average = WeightAverage(self.model, config.ema, state.average if resumed else {})
        count = len(self._source("train").labels)
        step = self._training_step(optimizer)
        task = self.progress.add_task(
            self._stage,
            total=epochs * count,
            completed=state.epoch * count,
            unit="images",
            note="",
        )
        if stage == config.stages and self.device.type == "cuda":
            import_ahead()  # beside plans of convolutions and replays, which need no Python
        while state.epoch < epochs and not stalled(state, config):
            started = time.perf_counter()
            epoch = state.epoch + 1
            row: dict[str, Any] = {"stage": stage, "epoch": epoch}
            row |= self._train_epoch(epoch, step, task)
            if not state.refit:  # which has no image left to judge by
                with self.phases("validation"), self._averaged():
                    measured = self.evaluate("val")
                self._check_finite(measured["loss"], epoch, "validation")
                row |= {f"val_{key}": measured[key] for key in ("loss", "accuracy", "macro_f1")}
            row["seconds"] = round(time.perf_counter() - started, 3)
            self._complete_epoch(row, optimizer)
        self.progress.remove_task(task)

    @property
    def _stage(self) -> str:
        """What trains now, for a reader."""
        return f"{'refit, ' if self.state.refit else ''}stage {self.state.stage}"

    def _training_step(self, optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
        """Return the step of the present stage."""
        config, source = self.config, self._source("train")
        epochs, _, batch_size = config.of_stage(self.state.stage)
        steps = (epochs - self.state.epoch) * (len(source.labels) // batch_size)
        weights = class_weights(source.labels, self.dataset, self.config)
        return training_step(
            lambda inputs: logits_of(self.model, source, inputs),
            optimizer,
            self._autocast,
            scaler=self.scaler,
            class_weights=None if weights is None else weights.to(self.device),
            label_smoothing=config.label_smoothing,
            clip_grad=config.clip_grad,
            graph=config.cuda_graph == "auto" and steps >= LEAST_STEPS,
            say=self._say,
            sums=self.processes.gradient_sum(self.model.train()),
            on_full=halving(
                self.model, f"batch_size{'' if self.state.stage == 1 else 2}", self._say
            ),
        )

    def _train_epoch(
        self, epoch: int, take_step: Callable[..., Any], task: TaskID
    ) -> dict[str, float]:
        """Pass over the training split once; return the last learning rate and the mean loss."""
        config, stage, source = self.config, self.state.stage, self._source("train")
        epochs, peak, batch_size = config.of_stage(stage)
        count = len(source.labels)

        # Every random stream of an epoch follows from these numbers: there is no state to save.
        rng = np.random.default_rng((config.seed, stage, epoch))
        # What is drawn in passing differs between processes, whose images differ.
        torch.manual_seed((int(rng.integers(2**63)) + self.processes.place.rank) % 2**63)
        order = rng.permutation(count)
        if source.num_views is None:
            views = np.full(count, len(self.state.history) + 1)
        else:
            views = rng.integers(source.num_views, size=count)
        if config.drop_last and count >= batch_size:
            order = order[: count // batch_size * batch_size]
        if count > batch_size > 1 and count % batch_size == 1:
            order = order[:-1]  # a batch of one image has no batch statistics

        steps = math.ceil(len(order) / batch_size)
        plan = Schedule(config.schedule, peak, epochs, steps, config.warmup_epochs)
        images = isinstance(source, ImageSource)
        mix = make_mix(config.mixup, config.cutmix, len(self.dataset.classes), images)
        losses = Losses(
            lambda loss, step: self._check_finite(loss, epoch, f"step {step} of {steps}")
        )
        self.progress.update(task, description=f"{self._stage}, epoch {epoch} of {epochs}")
        self.model.train()
        # One order for any number of processes, each of which has a piece of every batch.
        share = self.processes.share(order, batch_size)
        pad = (
            share.batch_size
            if steps > 1 and samples_are_independent(self.model, self.device)
            else 0
        )
        batches = source.batches(share.order, views, share.batch_size)
        for step, (inputs, labels) in enumerate(batches, start=1):
            number = (epoch - 1) * steps + step
            lr, taken = plan.rate(number), share.images(step - 1)
            if mix is not None:
                inputs, labels = mix(inputs, labels)
            if share.mine(step - 1) == 0:
                labels = torch.full_like(labels, PADDING if labels.dim() == 1 else 0)
            self.processes.before_step()
            loss, _ = take_step(lr, *reversed(padded(inputs, labels, pad)))
            if self._average is not None:
                self._average.update(number)
            losses.add(loss, taken)
            if losses.is_read:
                self.progress.update(task, note=losses.note)
                self.processes.after_reading()
            self.progress.advance(task, taken)
        return {"lr": lr, "train_loss": losses.total() / len(order)}

    def _complete_epoch(self, row: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Note the epoch, keep its weights if they are the best, offer the state to be saved."""
        state = self.state
        state.epoch = row["epoch"]
        state.history.append(row)
        # Copied where they are, in passing: nothing waits for a GPU.
        state.model = copy_of(trained_state(self.model))
        state.optimizer = {
            index: copy_of(values) for index, values in optimizer.state_dict()["state"].items()
        }
        state.scaler = self.scaler.state_dict()
        newest = len(state.history) - 1
        improved = (
            state.best is None
            or state.refit  # of which the last epoch is kept
            or better(state.history, newest, state.best, self.config)
        )
        if self._average is not None:
            state.average = self._average.tensors()
        if improved:
            state.best = newest
            with self._averaged():
                averaged = self._average is not None
                state.best_model = copy_of(trained_state(self.model)) if averaged else state.model
        if self.processes.first:
            self._write_epoch(row)
        self.progress.console.print(epoch_line(self._stage, row, improved), markup=False)

    def _write_epoch(self, row: dict[str, Any]) -> None:
        state = self.state
        with self.phases("saving"):
            if state.refit:
                pass  # metrics are of images that were held out
            elif self._wrote_metrics:
                append_metrics(self.out, row)
            else:  # anew, without epochs that a kill lost
                write_metrics(self.out, state.history)
                self._wrote_metrics = True
            self._saver.offer(replace(state, history=list(state.history)))

    def _averaged(self) -> AbstractContextManager:
        """Give the model the average of its weights, where there is one."""
        return nullcontext() if self._average is None else self._average.applied()

    def _save(self, state: State) -> None:
        save_state(state, self.settings, self.out / STATE)

    def _source(self, split: str) -> Source:
        """Return a split for the present stage; a refit trains on validation images, too."""
        if self.state.refit and split == "train":
            split = REFITTED
        if self.cached and self.state.stage == 1:
            return self._sources.features[split]
        return self._sources.images(split)

    def _cached_features(
        self, extraction: Extraction, images: ImageSource, settings: CacheSettings, name: str
    ) -> FeatureSource:
        with self.phases("features"):
            return cached_source(
                self.model,
                images,
                self.out / CACHE,
                settings,
                self.progress,
                self._autocast,
                name,
                self._writers,
                extraction,
            )

    def _autocast(self):
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def _check_finite(self, loss: float, epoch: int, where: str) -> None:
        check_finite(loss, self.config, self.state, f"epoch {epoch}, {where}")
