"""Measure classification: light metrics of an epoch, and all of a result, by scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np

# What folds and bundles say of a model in one number each.
SCORES = (
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "f1_of_means",
    "auroc",
    "average_precision",
    "mcc",
    "cohen_kappa",
    "ece",
)


def classification_metrics(
    labels: np.ndarray, predictions: np.ndarray, classes: tuple[str, ...]
) -> dict[str, Any]:
    """Return accuracy, macro-F1, precision, recall and F1 per class, and the confusion matrix.

    Args:
        labels: [N] true class indices.
        predictions: [N] predicted class indices.
        classes: names.

    Returns:
        For JSON. ``confusion`` has the true class in rows, the predicted one in columns. A ratio
        without cases is 0; classes that are neither present nor predicted do not count in
        ``macro_f1``.
    """
    count = len(classes)
    confusion = np.bincount(labels * count + predictions, minlength=count**2).reshape(count, count)
    return confusion_metrics(confusion, classes)


def confusion_metrics(confusion: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Compute the metrics of :func:`classification_metrics` from the confusion matrix.

    Args:
        confusion: [classes, classes] counts, the true class in rows, the predicted in columns.
        classes: names.
    """
    hits = confusion.diagonal()
    present, predicted = confusion.sum(1), confusion.sum(0)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(present, 1)
    f1 = 2 * hits / np.maximum(present + predicted, 1)
    seen = present + predicted > 0
    return {
        "images": int(confusion.sum()),
        "accuracy": float(hits.sum() / confusion.sum()),
        "macro_f1": float(f1[seen].mean()),
        "per_class": {
            name: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "images": int(present[i]),
            }
            for i, name in enumerate(classes)
        },
        "confusion": confusion.tolist(),
    }


def scores(
    labels: np.ndarray,
    predictions: np.ndarray,
    probabilities: np.ndarray,
    classes: tuple[str, ...],
) -> dict[str, Any]:
    """Return what :func:`classification_metrics` returns, with the metrics of a final result.

    With P and R the means of the classes' precision and recall, there are two macro-F1:
    ``macro_f1`` is the mean of the classes' F1 (scikit-learn's), ``f1_of_means`` is 2PR / (P + R)
    (that of CLAdapter's code). Means are over the classes that are present or predicted;
    ``balanced_accuracy`` is the mean recall of those that are present.

    Args:
        labels: [N] true class indices.
        predictions: [N] predicted class indices.
        probabilities: [N, K], the softmax of the logits.
        classes: K names.

    Returns:
        For JSON. ``auroc`` and ``average_precision`` are of each class against the rest in
        ``per_class``. Over all, of two classes the second is the positive one; of more it is the
        mean of those that are defined. What is undefined is None, and ``undefined`` says why.
    """
    from sklearn import metrics  # takes a second, once in a run

    found = classification_metrics(labels, predictions, classes)
    undefined: dict[str, str] = {}
    precision, recall, _, _ = metrics.precision_recall_fscore_support(
        labels, predictions, average="macro", zero_division=0.0
    )
    present = np.bincount(labels, minlength=len(classes)) > 0
    recalls = np.array([found["per_class"][name]["recall"] for name in classes])
    found |= {
        "accuracy_interval": accuracy_interval(found["accuracy"], len(labels)),
        "balanced_accuracy": float(recalls[present].mean()),
        "macro_precision": float(precision),
        "macro_recall": float(recall),
        "f1_of_means": float(2 * precision * recall / max(precision + recall, 1e-12)),
        "mcc": None,
        "cohen_kappa": None,
    }
    if len(np.union1d(labels, predictions)) > 1:
        found["mcc"] = float(metrics.matthews_corrcoef(labels, predictions))
        found["cohen_kappa"] = float(metrics.cohen_kappa_score(labels, predictions))
    else:
        undefined["mcc"] = undefined["cohen_kappa"] = "one class only, and nothing else predicted"

    finite = bool(np.isfinite(probabilities).all())
    no_probabilities = "the model's outputs hold NaN or infinite values"
    found["ece"] = calibration_error(labels, probabilities) if finite else None
    found["reliability"] = reliability(labels, probabilities) if finite else []
    if not finite:
        undefined["ece"] = no_probabilities
    for key, score in (
        ("auroc", metrics.roc_auc_score),
        ("average_precision", metrics.average_precision_score),
    ):
        values: list[float | None] = []
        missing = []
        for index, name in enumerate(classes):
            positive = labels == index
            defined = finite and 0 < positive.sum() < len(labels)
            values.append(float(score(positive, probabilities[:, index])) if defined else None)
            found["per_class"][name][key] = values[-1]
            if not defined:
                missing.append(name)
        defined_values = [value for value in values if value is not None]
        if len(classes) == 2:
            found[key] = values[1]
        else:
            found[key] = float(np.mean(defined_values)) if defined_values else None
        if not finite:
            undefined[key] = no_probabilities
        elif missing:
            which = ", ".join(missing)
            undefined[key] = f"no image, or every image, is of the class: {which}"
    return found | {"undefined": undefined}


def accuracy_interval(accuracy: float, images: int, seed: int = 0) -> list[float]:
    """Return the bootstrap 95 % interval of an accuracy: percentiles of 10,000 resamples.

    Drawing N of N images with replacement, the number of right ones is binomial(N, accuracy): the
    resamples need not be drawn image by image.
    """
    right = np.random.default_rng(seed).binomial(images, accuracy, size=10_000)
    low, high = np.percentile(right / images, (2.5, 97.5))
    return [float(low), float(high)]


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = 15
) -> list[dict[str, Any]]:
    """Return the mean confidence, the accuracy and the number of images of every bin with some.

    Args:
        labels, probabilities, bins: as for :func:`calibration_error`, whose bins these are.
    """
    confidence = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    index = _bins(confidence, bins)
    return [
        {
            "confidence": float(confidence[index == place].mean()),
            "accuracy": float(right[index == place].mean()),
            "images": int((index == place).sum()),
        }
        for place in np.unique(index)
    ]


def _bins(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Return the number of each confidence's bin: closed on the right, as in the paper."""
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017, equation 3).

    ECE = Σ_b |B_b| / N · |accuracy(B_b) - confidence(B_b)|, over bins of equal width of the largest
    probability.

    Args:
        labels: [N] true class indices.
        probabilities: [N, K].
        bins: their number.
    """
    confidence = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    gaps = np.bincount(_bins(confidence, bins), weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))
