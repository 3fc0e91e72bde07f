"""Evaluate GDPL models: base and novel classes, other data sets, and CLIP alone beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from fastadapt.cuda_graph import LEAST_STEPS, GraphedCall
from fastadapt.data.dataset import Sample
from fastadapt.data.images import ImageSource
from fastadapt.data.preprocess import Preprocess
from fastadapt.gdpl.domain_features import FeatureTable
from fastadapt.gdpl.few_shot import harmonic_mean
from fastadapt.gdpl.model import GDPLModel
from fastadapt.train.metrics import classification_metrics


@dataclass(frozen=True)
class Task:
    """Name some images to evaluate and the classes to tell apart.

    Attributes:
        name: of the column of results, ``"base"``, ``"novel"``, ``"all"`` or a data set's.
        samples: labelled by index into ``classes``.
        classes: the names in the texts.
    """

    name: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]


@dataclass
class Evaluator:
    """Run models on tasks and keep the domain features of evaluated images.

    Features are computed in the order and in the batches of their samples, so that they do not
    depend on earlier evaluations.

    Attributes:
        preprocess: of the CLIP model.
        device: where to compute.
        workers: threads that read images.
        autocast: makes the context that models run in.
        progress: bars and lines.
        table: domain features computed beforehand; ``None`` if the model computes them.
        batch_size: in images.
        graph: on a GPU, replay a CUDA graph where a task has enough batches.
    """

    preprocess: Preprocess
    device: torch.device
    workers: int
    autocast: Callable[[], AbstractContextManager]
    progress: Progress
    table: FeatureTable | None = None
    batch_size: int = 32
    graph: bool = False
    _features: dict[str, list[Tensor]] = field(default_factory=dict)
    _sources: dict[str, ImageSource] = field(default_factory=dict)

    def domain_features(self, model: GDPLModel, samples: Sequence[Sample]) -> Tensor:
        """Return features [len(samples), D_f] of images without augmentation, on the device."""
        if self.table is not None:
            return self.table.of([sample.path for sample in samples]).to(self.device)
        source = ImageSource(samples, self.preprocess, self.device, self.workers)
        batches = source.batches(np.arange(len(samples)), None, self.batch_size)
        return torch.cat([self._encode(model, images) for images, _ in batches])

    @torch.no_grad()
    def _encode(self, model: GDPLModel, images: Tensor) -> Tensor:
        with self.autocast():
            return model.domain_features(images).float()

    def measure(self, model: GDPLModel, task: Task, zero_shot: bool = False) -> dict[str, Any]:
        """Evaluate a model on a task; it has the task's class names afterwards.

        Args:
            model: on the device.
            task: the images and classes.
            zero_shot: evaluate the CLIP model alone instead.

        Returns:
            The metrics of :func:`fastadapt.train.metrics.classification_metrics`.
        """
        if model.class_names != task.classes:
            model.set_class_names(task.classes)
        model.eval()
        source = self._sources.get(task.name)
        if source is None:  # its images are decoded once, for all measurements
            source = ImageSource(task.samples, self.preprocess, self.device, self.workers)
            self._sources[task.name] = source
        order = np.arange(len(task.samples))
        bar = self.progress.add_task(
            f"evaluate {task.name}", total=len(order), unit="images", note=""
        )
        known = self._features.setdefault(task.name, [])
        if self.table is not None and not known:
            known += self.domain_features(model, task.samples).split(self.batch_size)
        predict = self._prediction(model.zero_shot if zero_shot else model, len(order))
        predictions = []
        with torch.inference_mode():
            for index, (images, labels) in enumerate(source.batches(order, None, self.batch_size)):
                if not zero_shot and index == len(known):
                    known.append(self._encode(model, images))
                predicted = predict(images) if zero_shot else predict(images, known[index])
                predictions += predicted.tolist()
                self.progress.advance(bar, len(labels))
        self.progress.remove_task(bar)
        return classification_metrics(source.labels, np.array(predictions), task.classes)

    def _prediction(self, logits: Callable[..., Tensor], images: int) -> Callable[..., Any]:
        """Return a function to the most likely classes [B]; a graph holds full batches only."""

        def predict(*inputs: Tensor) -> Tensor:
            with self.autocast():
                return logits(*inputs).argmax(1)

        if not self.graph or images // self.batch_size < LEAST_STEPS:
            return predict
        return GraphedCall(predict, most=1, say=partial(self.progress.console.print, markup=False))


def accuracies(metrics: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the accuracy per task, with the harmonic mean after base and novel."""
    found = {name: values["accuracy"] for name, values in metrics.items()}
    if "novel" not in found:
        return found
    mean = harmonic_mean(found["base"], found["novel"])
    rest = {name: value for name, value in found.items() if name not in ("base", "novel")}
    return {"base": found["base"], "novel": found["novel"], "harmonic mean": mean, **rest}


def result_rows(results: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of the results table: a title, and the accuracies in percent.

    Args:
        results: what :func:`fastadapt.gdpl.train_gdpl` returned, the content of ``results.json``.
    """
    rows = []
    if results["zero_shot"] is not None:
        rows.append(("CLIP alone", _percent(accuracies(results["zero_shot"]))))
    seeds = [(seed, accuracies(run["metrics"])) for seed, run in results["seeds"].items()]
    rows += [(f"GDPL, seed {seed}", _percent(values)) for seed, values in seeds]
    if len(seeds) > 1:
        # As for every other column: the mean of the seeds' harmonic means.
        columns = {name: [values[name] for _, values in seeds] for name in seeds[0][1]}
        freedom = 0 if results.get("deviation") == "population" else 1
        text = {
            name: f"{100 * np.mean(v):.2f} ± {100 * np.std(v, ddof=freedom):.2f}"
            for name, v in columns.items()
        }
        rows.append((f"GDPL, mean of {len(seeds)}", text))
    return rows


def result_table(results: dict[str, Any]) -> Table:
    """Render the accuracies in percent for the terminal."""
    rows = result_rows(results)
    table = Table(title="accuracy in %", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in rows[0][1]:
        table.add_column(name, justify="right")
    for name, values in rows:
        table.add_row(name, *values.values())
    return table


def result_markdown(results: dict[str, Any]) -> str:
    """Render the accuracies in percent as a Markdown table."""
    rows = result_rows(results)
    columns = list(rows[0][1])
    lines = [
        f"| accuracy in % | {' | '.join(columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
        *(f"| {name} | {' | '.join(values.values())} |" for name, values in rows),
    ]
    return "\n".join(lines) + "\n"


def _percent(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{100 * value:.2f}" for name, value in values.items()}
