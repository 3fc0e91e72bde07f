"""What is computed of images: a model's predictions or features, as a value that can be sent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastadapt.data.decode_on import DecodeOn
from fastadapt.errors import InputError

from .columns import Columns, FeatureColumns, PredictionColumns
from .models import ImageModel, identify, open_classifier, open_embedder
from .settings import EmbedSettings, PredictSettings


@dataclass(frozen=True)
class Request:
    """A model and the columns of its results; a process that gets it can do the work.

    Attributes:
        settings: of the command.
        trust: run native code of a bundle that was not made on this machine.
        decode: what decodes: a GPU's pixels differ by a value or two.
    """

    settings: PredictSettings | EmbedSettings
    trust: bool = False
    decode: DecodeOn = "cpu"

    def open(self, device: str) -> ImageModel:
        """Load the model.

        Raises:
            InputError: it does not exist, cannot be loaded, or lacks what is asked for.
        """
        asked = self.settings
        if isinstance(asked, PredictSettings):
            model = open_classifier(
                asked.model,
                device=device,
                trust=self.trust,
                embeddings=asked.embeddings,
                task=asked.task,
            )
            if model.tasks and asked.labels is not None:
                names = ", ".join(task.name for task in model.tasks)
                raise InputError(f"`labels` are of one task: name it with `task=...` ({names})")
            return model
        return open_embedder(
            asked.model,
            device=device,
            trust=self.trust,
            weights=asked.weights,
            image_size=asked.image_size,
        )

    def columns(self, model: ImageModel) -> Columns:
        """Return the columns of the results."""
        asked = self.settings
        if isinstance(asked, EmbedSettings):
            return FeatureColumns(model)
        return PredictionColumns(
            model, asked.logits, asked.top_k, asked.labels is not None, asked.embeddings
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Return the settings that the rows depend on."""
        asked = self.settings
        found: dict[str, Any] = {"command": "embed"}
        if isinstance(asked, PredictSettings):
            names = ("labels", "logits", "top_k", "embeddings")
            found = {"command": "predict", **{name: getattr(asked, name) for name in names}}
        return {**found, "decode": "gpu"} if self.decode == "gpu" else found

    def model_identity(self) -> dict[str, Any]:
        """Return what tells the model from others, whatever it runs in.

        Raises:
            InputError: it does not exist, or cannot be read.
        """
        asked = self.settings
        if isinstance(asked, EmbedSettings):
            return identify(asked.model, weights=asked.weights, image_size=asked.image_size)
        found = identify(asked.model)
        return found if asked.task is None else {**found, "task": asked.task}


def described(model: ImageModel) -> ImageModel:
    """Return a model that can be sent to another process, where it cannot run."""
    return replace(model, run=_elsewhere)


def _elsewhere(pixels: np.ndarray) -> np.ndarray:
    raise RuntimeError("this model runs in another process")
