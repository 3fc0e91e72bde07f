"""The columns of the results: what is written of a model's outputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastadapt.decision import UNDECIDED, Decision, softmax

if TYPE_CHECKING:
    from .models import ImageModel


@dataclass(frozen=True)
class Column:
    """A column: one value for each image, or several.

    Attributes:
        name: of the column.
        entries: names of an image's values, which have a column each in a CSV; empty for a column
            of one text for each image.
        numbers: whether the values are fp32 numbers; else they are texts.
        keyed: whether the entries' names say more than their order.
    """

    name: str
    entries: tuple[str, ...] = ()
    numbers: bool = False
    keyed: bool = False


# For each column a list of texts, or an array [images, entries].
Values = list[list[str] | np.ndarray]


class _TaskColumns:
    """The columns of one model's classes, or of one of several tasks'.

    Args:
        classes: names in the outputs' order.
        decision: how probabilities become classes.
        logits, top_k, target: as for :class:`PredictionColumns`.
        task: follows the columns' names.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        decision: Decision,
        logits: bool,
        top_k: int,
        target: bool = False,
        task: str = "",
    ):
        self.classes, self.decision, self.logits, self.target = classes, decision, logits, target
        self.top_k = min(top_k, len(classes))
        names, end = unique(classes), task and f":{task}"
        self.columns = [
            Column(f"prediction{end}"),
            *([Column("target")] if target else []),
            Column(f"probabilities{end}", names, numbers=True, keyed=True),
            *([Column(f"logits{end}", names, numbers=True, keyed=True)] if logits else []),
        ]
        if self.top_k:
            places = tuple(str(place + 1) for place in range(self.top_k))
            self.columns += [
                Column(f"top_classes{end}", places),
                Column(f"top_probabilities{end}", places, numbers=True),
            ]

    def values(self, labels: list[str], outputs: np.ndarray) -> Values:
        """Return the columns' values of logits [images, classes]."""
        classes = np.array(self.classes, dtype=object)
        probabilities = softmax(outputs)
        chosen = self.decision.of_logits(outputs)
        found: Values = [np.where(chosen == UNDECIDED, "", classes[chosen]).tolist()]
        if self.target:
            found.append(labels)
        found.append(probabilities)
        if self.logits:
            found.append(outputs)
        if self.top_k:
            order = np.argsort(-outputs, axis=1, kind="stable")[:, : self.top_k]
            found += [classes[order], np.take_along_axis(probabilities, order, axis=1)]
        return found


class PredictionColumns:
    """The columns of ``fastadapt predict``; of several tasks each has its own.

    Args:
        model: that predicts.
        logits: write its outputs, too.
        top_k: write as many of the likeliest classes, too.
        target: write the known class, too; of a model without tasks.
        embeddings: write the features before the head, too, which are the model's last outputs.
    """

    def __init__(
        self,
        model: ImageModel,
        logits: bool = False,
        top_k: int = 0,
        target: bool = False,
        embeddings: bool = False,
    ):
        self.classes, self.decision, self.embeddings = model.classes, model.decision, embeddings
        self._parts = [
            (task.columns, _TaskColumns(task.classes, task.decision, logits, top_k, task=task.name))
            for task in model.tasks
        ]
        if not model.tasks:
            one = _TaskColumns(model.classes, model.decision, logits, top_k, target)
            self._parts = [(slice(0, len(model.classes)), one)]
        self.columns = [Column("path")]
        for _, part in self._parts:
            self.columns += part.columns
        if embeddings:
            entries = tuple(map(str, range(model.width - len(self.classes))))
            self.columns.append(Column("embeddings", entries, numbers=True))

    def values(self, paths: list[str], labels: list[str], outputs: np.ndarray) -> Values:
        """Return the columns' values for images that could be read."""
        found: Values = [paths]
        for columns, part in self._parts:
            found += part.values(labels, outputs[:, columns])
        if self.embeddings:
            found.append(outputs[:, len(self.classes) :])
        return found

    def confusion(self, labels: list[str], outputs: np.ndarray) -> Counter[tuple[int, int]]:
        """Count the pairs of known and predicted class, by their numbers; -1 is undecided."""
        number = {name: index for index, name in enumerate(self.classes)}
        predicted = self.decision.of_logits(outputs[:, : len(self.classes)]).tolist()
        pairs = zip(labels, predicted, strict=True)
        return Counter((number[label], guess) for label, guess in pairs if label)


class FeatureColumns:
    """The columns of ``fastadapt embed``.

    Args:
        model: that computes features.
    """

    def __init__(self, model: ImageModel):
        entries = tuple(map(str, range(model.width)))
        self.columns = [Column("path"), Column("features", entries, numbers=True)]

    def values(self, paths: list[str], labels: list[str], outputs: np.ndarray) -> Values:
        """Return the columns' values for images that could be read."""
        return [paths, outputs]

    def confusion(self, labels: list[str], outputs: np.ndarray) -> Counter[tuple[int, int]]:
        """Count nothing: features have no class."""
        return Counter()


Columns = PredictionColumns | FeatureColumns


def unique(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names, and number those that occur again: ImageNet has two "crane"."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(found)
