"""Turn probabilities into decisions: a threshold for two classes, and images left undecided.

With p [N] the probability of the second of two classes, t the threshold and low ≤ t ≤ high:

    (1)  second class where p > t, else the first
    (2)  undecided where low < p < high,  logit(high) - logit(t) = logit(t) - logit(low)

Of more classes the likeliest is taken, undecided where its probability is below a bound. Threshold
and bounds are chosen on validation and stored with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

import numpy as np

from fastadapt.errors import InputError

Criterion = Literal["none", "balanced_accuracy", "f1", "youden"]
CRITERIA: tuple[str, ...] = get_args(Criterion)
UNDECIDED = -1
CLOSEST = 1e-6  # probabilities are kept so far from 0 and 1, where a logit is infinite


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities [N, K] of logits, in their dtype; NaN where the largest is infinite."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Decision:
    """How probabilities become a class; the defaults take the likeliest one.

    Attributes:
        criterion: what the threshold is the best for.
        threshold: of two classes: the probability of the second from which it is taken.
        abstain: the share of validation images that were to be left undecided.
        band: of two classes: the probabilities of the second between which nothing is decided.
        confidence: of more classes: the largest probability below which nothing is decided.
    """

    criterion: str = "none"
    threshold: float = 0.5
    abstain: float = 0.0
    band: tuple[float, float] | None = None
    confidence: float | None = None

    @property
    def plain(self) -> bool:
        """Whether the likeliest class is taken, always."""
        return self == LIKELIEST

    def classes(self, probabilities: np.ndarray) -> np.ndarray:
        """Return [N] class indices by (1), none left undecided.

        Args:
            probabilities: [N, K].
        """
        if probabilities.shape[1] == 2 and self.threshold != 0.5:
            return (probabilities[:, 1] > self.threshold).astype(np.int64)
        return probabilities.argmax(1)

    def undecided(self, probabilities: np.ndarray) -> np.ndarray:
        """Return [N] whether an image is left undecided, by (2)."""
        if self.band is not None and probabilities.shape[1] == 2:
            low, high = self.band
            return (probabilities[:, 1] > low) & (probabilities[:, 1] < high)
        if self.confidence is not None:
            return probabilities.max(1) < self.confidence
        return np.zeros(len(probabilities), bool)

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """Return [N] class indices, :data:`UNDECIDED` for images that are left undecided."""
        return np.where(self.undecided(probabilities), UNDECIDED, self.classes(probabilities))

    def of_logits(self, logits: np.ndarray) -> np.ndarray:
        """Return what :meth:`decide` does, of logits [N, K].

        Images whose probabilities are NaN, since a logit is or overflowed, are left undecided: by
        comparisons they would all be of the first class.
        """
        known = np.isfinite(logits.max(1))
        if self.plain:
            return np.where(known, logits.argmax(1), UNDECIDED)
        logits = np.where(known[:, None], logits, 0).astype(np.float64)
        return np.where(known, self.decide(softmax(logits)), UNDECIDED)

    def to_dict(self) -> dict[str, Any]:
        """Return the decision for JSON."""
        found = asdict(self)
        return found | {"band": None if self.band is None else list(self.band)}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Self:
        """Read what a file holds; nothing (``None``) is the likeliest class.

        Raises:
            InputError: a value cannot be.
        """
        if values is None:
            return cls()
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: the decision is {values!r}; expected a JSON object")
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("threshold", "abstain", "confidence"):
            if known.get(name) is not None and not _is_share(known[name]):
                raise InputError(f"{where}: the decision's {name} is {known[name]!r}; expected 0–1")
        if known.get("criterion", "none") not in CRITERIA:
            raise InputError(f"{where}: the decision's criterion is {known['criterion']!r}")
        band = known.get("band")
        if band is not None:
            if (
                not isinstance(band, list | tuple)
                or len(band) != 2
                or not all(map(_is_share, band))
            ):
                raise InputError(f"{where}: the decision's band is {band!r}; expected two of 0–1")
            known["band"] = (float(band[0]), float(band[1]))
        return cls(**known)

    def __str__(self) -> str:
        """Say it in words."""
        said = []
        if self.threshold != 0.5:
            said.append(f"second class above {self.threshold:.3f} ({self.criterion})")
        if self.band is not None:
            said.append(f"undecided between {self.band[0]:.3f} and {self.band[1]:.3f}")
        if self.confidence is not None:
            said.append(f"undecided below {self.confidence:.3f}")
        return ", ".join(said) or "the likeliest class"


LIKELIEST = Decision()


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def check_decision(criterion: str, classes: int) -> None:
    """Refuse a threshold where there are not two classes.

    Raises:
        InputError: as said.
    """
    if criterion != "none" and classes != 2:
        raise InputError(
            f"threshold is {criterion!r}, which is for two classes, and the data have {classes}: "
            "leave it out"
        )


def choose_decision(
    probabilities: np.ndarray, labels: np.ndarray, criterion: str = "none", abstain: float = 0.0
) -> tuple[Decision, list[str]]:
    """Choose threshold and bounds on validation images.

    Of thresholds that are equally good, that nearest to one half is taken.

    Args:
        probabilities: [N, K], calibrated.
        labels: [N].
        criterion: one of :data:`CRITERIA`; ``youden`` (sensitivity + specificity - 1) has the same
            optimum as balanced accuracy, ``f1`` is that of the second class.
        abstain: the share of the images, the least certain ones, to leave undecided.

    Returns:
        The decision, and lines that say what could not be chosen.
    """
    check_decision(criterion, probabilities.shape[1])
    notes: list[str] = []
    if not np.isfinite(probabilities).all():
        return Decision(), ["no threshold: the model's outputs hold NaN or infinite values"]
    threshold = 0.5
    if criterion != "none":
        if len(np.unique(labels)) < 2:
            notes.append("no threshold: validation has images of one class only; it stays at 0.5")
        else:
            threshold = _best_threshold(probabilities[:, 1], labels, criterion)
    decision = Decision(criterion, threshold)
    if abstain > 0:
        return _with_bounds(decision, probabilities, abstain), notes
    return decision, notes


def _best_threshold(p: np.ndarray, labels: np.ndarray, criterion: str) -> float:
    """Return the threshold between two neighbouring probabilities that is best on validation."""
    known = np.unique(p.clip(CLOSEST, 1 - CLOSEST))
    candidates = np.concatenate([(known[1:] + known[:-1]) / 2, [0.5]])
    # How many of each class lie above each candidate.
    positive, negative = np.sort(p[labels == 1]), np.sort(p[labels == 0])
    hits = len(positive) - np.searchsorted(positive, candidates, "right")
    false = len(negative) - np.searchsorted(negative, candidates, "right")
    if criterion == "f1":
        values = 2 * hits / np.maximum(len(positive) + hits + false, 1)
    else:
        values = hits / len(positive) + (len(negative) - false) / len(negative)
    best = np.flatnonzero(values >= values.max() - 1e-12)
    return float(candidates[best[np.abs(candidates[best] - 0.5).argmin()]])


def _with_bounds(decision: Decision, probabilities: np.ndarray, abstain: float) -> Decision:
    """Add bounds between which the least certain share of the images lies."""
    two = probabilities.shape[1] == 2
    if two:
        distance = np.abs(_logit(probabilities[:, 1]) - _logit(np.array(decision.threshold)))
    else:
        distance = probabilities.max(1)
    ordered = np.sort(distance)
    count = min(round(abstain * len(ordered)), len(ordered) - 1)
    if count == 0:
        return Decision(decision.criterion, decision.threshold, abstain)
    width = float(ordered[count - 1] + ordered[count]) / 2
    if not two:
        return Decision(decision.criterion, decision.threshold, abstain, confidence=width)
    middle = float(_logit(np.array(decision.threshold)))
    band = (_sigmoid(middle - width), _sigmoid(middle + width))
    return Decision(decision.criterion, decision.threshold, abstain, band)


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.asarray(p, np.float64).clip(CLOSEST, 1 - CLOSEST)
    return np.log(p / (1 - p))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
