"""Bootstrap intervals of metrics: what the number of images, or of groups, leaves open.

Of C clusters (groups; images, where there are none), C are drawn with replacement, R times:

    (1)  w [R, C] ~ multinomial(C, 1/C),  a row's weight is that of its cluster
    (2)  metric of the weighted rows [R];  its 2.5 and 97.5 percentiles
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES, FEWEST = 1000, 200
MOST_DRAWS = 20_000_000  # rows times resamples: beyond this the interval is narrow anyway
AT_ONCE = 1 << 22  # weights in memory
MOST_RANKED = 200_000  # rows times classes whose AUROC is resampled: 1,000 times in a second


def bootstrap_intervals(
    labels: np.ndarray,
    predictions: np.ndarray,
    probabilities: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return 95 % intervals of accuracy, balanced accuracy, macro-F1 and AUROC.

    Args:
        labels: [N] true class indices.
        predictions: [N] predicted class indices.
        probabilities: [N, K].
        clusters: [N], what is drawn as one; ``None`` if every row stands alone.
        seed: of the draws.

    Returns:
        ``[low, high]`` by metric, as :func:`fastadapt.train.metrics.scores` names them. AUROC is
        left out where it is undefined, or the rows are too many.
    """
    count, classes = probabilities.shape
    numbers = np.arange(count)
    if clusters is not None:
        known: dict[Hashable, int] = {}
        numbers = np.array([known.setdefault(cluster, len(known)) for cluster in clusters])
    total = int(numbers.max()) + 1
    rng = np.random.default_rng(seed)
    ranks = _Ranks.of(labels, probabilities)
    found: dict[str, list[np.ndarray]] = {}
    resamples = max(FEWEST, min(RESAMPLES, MOST_DRAWS // count))
    size = max(1, min(resamples, AT_ONCE // count))
    for start in range(0, resamples, size):
        drawn = rng.multinomial(total, np.full(total, 1 / total), min(size, resamples - start))
        weights = drawn[:, numbers].astype(np.float64)
        values = _of_confusion(labels, predictions, weights, classes)
        if ranks is not None:
            values["auroc"] = ranks.auroc(weights)
        for name, part in values.items():
            found.setdefault(name, []).append(part)
    return {
        name: [float(p) for p in np.nanpercentile(np.concatenate(parts), (2.5, 97.5))]
        for name, parts in found.items()
    }


def _of_confusion(
    labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray, classes: int
) -> dict[str, np.ndarray]:
    """Return [R] of the metrics that follow from confusion matrices."""
    pairs = labels * classes + predictions
    confusion = np.stack([np.bincount(pairs, row, classes**2) for row in weights])
    confusion = confusion.reshape(-1, classes, classes)
    hits = confusion.diagonal(axis1=1, axis2=2)
    present, predicted = confusion.sum(2), confusion.sum(1)
    with np.errstate(invalid="ignore"):  # what is absent from a resample does not count in it
        recall, f1 = hits / present, 2 * hits / (present + predicted)
    return {
        "accuracy": hits.sum(1) / present.sum(1),
        "balanced_accuracy": _mean_of_defined(recall),
        "macro_f1": _mean_of_defined(f1),
    }


class _Ranks:
    """Rows in the order of their probabilities, for the AUROC of each class against the rest."""

    def __init__(self, labels: np.ndarray, probabilities: np.ndarray, columns: Sequence[int]):
        self.parts = []
        for column in columns:
            values = probabilities[:, column]
            order = np.argsort(values, kind="stable")
            starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))  # of equal values
            self.parts.append((order, starts, (labels == column)[order]))

    @classmethod
    def of(cls, labels: np.ndarray, probabilities: np.ndarray) -> _Ranks | None:
        """Rank the rows, if that is defined and not too much."""
        count, classes = probabilities.shape
        columns = [1] if classes == 2 else list(range(classes))
        defined = [c for c in columns if 0 < (labels == c).sum() < count]
        finite = np.isfinite(probabilities).all()
        if not defined or not finite or count * len(defined) > MOST_RANKED:
            return None
        return cls(labels, probabilities, defined)

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """Return [R]: the share of pairs in which the positive row is the higher one."""
        values = []
        for order, starts, positive in self.parts:
            ordered = weights[:, order]
            above = np.add.reduceat(ordered * positive, starts, axis=1)
            other = np.add.reduceat(ordered * ~positive, starts, axis=1)
            below = np.cumsum(other, axis=1) - other / 2  # equal ones count half
            pairs = above.sum(1) * other.sum(1)
            with np.errstate(invalid="ignore"):
                values.append((above * below).sum(1) / pairs)
        return _mean_of_defined(np.stack(values, axis=1))


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Return [R] means over the columns of [R, n] that are no NaN; NaN where none is."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(1) / defined.sum(1)
