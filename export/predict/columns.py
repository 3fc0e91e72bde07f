"""The columns of the results: what is written of a model's outputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastadapt.decision import UNDECIDED

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


class PredictionColumns:
    """The columns of ``fastadapt predict``.

    Args:
        model: that predicts.
        logits: write its outputs, too.
        top_k: write as many of the likeliest classes, too.
        target: write the known class, too.
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
        self.classes, self.embeddings = model.classes, embeddings
        self.decision = model.decision
        self.logits, self.target = logits, target
        self.top_k = min(top_k, len(self.classes))
        names = unique(self.classes)
        self.columns = [
            Column("path"),
            Column("prediction"),
            *([Column("target")] if target else []),
            Column("probabilities", names, numbers=True, keyed=True),
            *([Column("logits", names, numbers=True, keyed=True)] if logits else []),
        ]
        if self.top_k:
            places = tuple(str(place + 1) for place in range(self.top_k))
            self.columns += [
                Column("top_classes", places),
                Column("top_probabilities", places, numbers=True),
            ]
        if embeddings:
            entries = tuple(map(str, range(model.width - len(self.classes))))
            self.columns.append(Column("embeddings", entries, numbers=True))

    def values(self, paths: list[str], labels: list[str], outputs: np.ndarray) -> Values:
        """Return the columns' values for images that could be read."""
        classes = np.array(self.classes, dtype=object)
        outputs, features = np.split(outputs, [len(classes)], axis=1)
        powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        chosen = self.decision.of_logits(outputs)
        names = np.where(chosen == UNDECIDED, "", classes[chosen]).tolist()
        found: Values = [paths, names]
        if self.target:
            found.append(labels)
        found.append(probabilities)
        if self.logits:
            found.append(outputs)
        if self.top_k:
            order = np.argsort(-outputs, axis=1, kind="stable")[:, : self.top_k]
            found += [classes[order], np.take_along_axis(probabilities, order, axis=1)]
        if self.embeddings:
            found.append(features)
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
