"""A model's answers for some images: logits, probabilities, classes, and those of each task."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fastadapt.decision import LIKELIEST, UNDECIDED, Decision, softmax
from fastadapt.errors import InputError

from .tasks import Task, find_task


@dataclass(frozen=True)
class Prediction:
    """A model's outputs for some images.

    Of a bundle with several tasks, ``prediction["grade"]`` is the prediction of one, and the logits
    of all stand side by side.

    Attributes:
        logits: fp32 [images, classes]; features, if the model has no head.
        classes: names in the outputs' order; empty without a head, and with several tasks.
        decision: how probabilities become classes.
        tasks: of the bundle, where it has several.
    """

    logits: np.ndarray
    classes: tuple[str, ...]
    decision: Decision = LIKELIEST
    tasks: tuple[Task, ...] = ()

    def __getitem__(self, name: str) -> Prediction:
        """Return the prediction of one of several tasks.

        Raises:
            InputError: there is no such task.
        """
        task = find_task(self.tasks, name)
        return Prediction(self.logits[:, task.columns], task.classes, task.decision)

    @property
    def labels(self) -> list[str]:
        """The class of every image: the most likely one, unless the bundle has a threshold.

        Empty strings without a head, and for images that are left undecided.
        """
        self._check_one("labels")
        if not self.classes:
            return [""] * len(self.logits)
        chosen = self.decision.of_logits(self.logits)
        return ["" if index == UNDECIDED else self.classes[index] for index in chosen]

    @property
    def probabilities(self) -> np.ndarray:
        """The softmax of the logits [images, classes]."""
        self._check_one("probabilities")
        return softmax(self.logits)

    def _check_one(self, what: str) -> None:
        if self.tasks:
            names = ", ".join(task.name for task in self.tasks)
            raise InputError(
                f"this bundle has several tasks ({names}), each with {what} of its own: ask for "
                f"prediction[{self.tasks[0].name!r}].{what}"
            )

    def __len__(self) -> int:
        return len(self.logits)


@dataclass(frozen=True)
class PredictedImage:
    """A model's outputs for one image file.

    Attributes:
        path: as it was given.
        label: the class; empty without a head, if it is left undecided, if the file cannot be read,
            and with several tasks.
        probabilities, logits: fp32 [classes]; ``None`` if the file cannot be read, and with several
            tasks.
        problem: why the file cannot be read, in one line; ``None`` if it was.
        tasks: of a bundle with several, by name: what each says of the image.
    """

    path: str | os.PathLike
    label: str = ""
    probabilities: np.ndarray | None = None
    logits: np.ndarray | None = None
    problem: str | None = None
    tasks: Mapping[str, PredictedImage] = field(default_factory=dict)

    def __getitem__(self, name: str) -> PredictedImage:
        """Return what one of several tasks says of the image."""
        return self.tasks[name]
