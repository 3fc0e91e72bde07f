"""What an export works with once its model is folded: images, inputs, expected outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt import __version__
from fastadapt.errors import InputError

from ..backends.onnx import export_onnx
from ..fold import FoldReport
from ..graph_input import NAME, GraphInput, Inputs
from ..precision.int8 import QuantizationImages, TaskTargets
from ..tasks import Task
from .golden import GoldenSamples
from .samples import Pixels, Sample, Samples
from .trained import Trained


@dataclass(frozen=True)
class ModelInputs:
    """Some samples as inputs of the model and of the bundle's files.

    Attributes:
        chosen: the samples.
        graph_input: what the bundle's files take.
        pixels: of the samples.
        others: further inputs of the model, by name.
        example: all inputs of the model, the normalised images first.
    """

    chosen: list[Sample]
    graph_input: GraphInput
    pixels: Pixels
    others: dict[str, Tensor]
    example: tuple[Tensor, ...]

    def golden(
        self,
        expected: np.ndarray,
        origin: str,
        features: np.ndarray | None = None,
        tasks: tuple[Task, ...] = (),
    ) -> GoldenSamples:
        """Keep these samples in the bundle, with the model's outputs for them."""
        return GoldenSamples(
            images=self.pixels.images,
            labels=tuple(sample.label for sample in self.chosen),
            inputs={NAME: self.pixels.given, **self.others},
            expected=expected,
            origin=origin,
            features=features,
            tasks=tasks,
        )


@dataclass(frozen=True)
class Material:
    """What an export works with.

    Attributes:
        trained: the model before folding, and what is known of it.
        samples: all images that may be used.
        given: the inputs that parity is checked on.
        expected: the model's outputs for them [samples, outputs].
        folded: the folded model.
        fold_report: what folding did.
        features: the model's features before its head [samples, dim], if they are an output, too.
    """

    trained: Trained
    samples: Samples
    given: ModelInputs
    expected: np.ndarray
    folded: nn.Module
    fold_report: FoldReport
    features: np.ndarray | None = None

    @property
    def classes(self) -> bool:
        """Whether the model's outputs are classes."""
        return bool(self.trained.labels or self.trained.parts)

    @property
    def inputs(self) -> Inputs:
        """What the bundle's files take, for the chosen images."""
        given = self.given
        others = {name: x.numpy() for name, x in given.others.items()}
        return {NAME: given.graph_input.array(given.pixels.given.numpy()), **others}

    @property
    def golden(self) -> GoldenSamples:
        """The samples that parity is checked on, as a bundle keeps them."""
        return self.given.golden(
            self.expected, self.samples.origin, self.features, self.trained.tasks
        )

    def write_onnx(self, module: nn.Module, path: Path, **options: Any) -> dict[str, Any]:
        """Call :func:`export_onnx` on a module that takes and gives what ``folded`` does."""
        return export_onnx(
            module,
            path,
            input_size=self.trained.preprocess.input_size,
            other_inputs={name: tuple(x.shape[1:]) for name, x in self.given.others.items()},
            graph_input=self.given.graph_input,
            features=self.features is not None,
            outputs=[task.name for task in self.trained.tasks],
            labels=self.trained.labels,
            metadata=self._metadata(),
            **options,
        )

    def _metadata(self) -> dict[str, Any]:
        hashes = {"run_sha256": "config_sha256", "adapter_sha256": "adapter_sha256"}
        source = self.trained.source
        tasks = {task.name: list(task.classes) for task in self.trained.tasks}
        return {
            "preprocessing": self.given.graph_input.to_dict(),
            "fastadapt": __version__,
            "backbone": self.trained.backbone,
            **{key: source[name] for key, name in hashes.items() if name in source},
            **({"tasks": tasks} if tasks else {}),
        }

    def quantization_images(self) -> QuantizationImages:
        """Return the images that INT8 and FP8 are calibrated with, and judged by."""
        labels, validation = self.trained.labels, self.samples.validation
        classes = [labels.index(s.label) for s in validation if s.label in labels]
        preprocess, graph_input = self.trained.preprocess, self.given.graph_input

        def read(paths: Sequence[Path]) -> np.ndarray:
            pixels = torch.stack([preprocess.read(path) for path in paths])
            return graph_input.array(pixels.numpy())

        return QuantizationImages(
            [sample.path for sample in self.samples.calibration],
            [sample.path for sample in validation],
            np.array(classes) if len(classes) == len(validation) else None,
            read,
            tuple(_targets(task, validation) for task in self.trained.tasks),
        )


def _targets(task: Task, validation: Sequence[Sample]) -> TaskTargets:
    """Return the classes that images are known to have in one of several tasks."""
    number = {name: index for index, name in enumerate(task.classes)}
    known = [sample.tasks.get(task.name) for sample in validation]
    found = np.array([-1 if label is None else number.get(label, -1) for label in known])
    return TaskTargets(task.name, found if (found >= 0).any() else None)


def check_quantization(flag: str, trained: Trained, samples: Samples) -> None:
    """Raise InputError if there is nothing to calibrate INT8 or FP8 with, or to judge it by."""
    if not samples.calibration or not samples.validation:
        raise InputError(
            f"{flag} is calibrated and judged on image files: give a folder of them with "
            "`images=...`"
        )
    if not trained.labels and not trained.parts:
        raise InputError(f"{flag} is judged by its accuracy, and this model has no classes")
    if trained.domain_features is not None:
        raise InputError(f"{flag} is for graphs that take images alone: leave out `domain_input`")
