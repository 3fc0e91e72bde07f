"""Classification metrics from predictions, after scikit-learn's definitions."""

from __future__ import annotations

from typing import Any

import numpy as np


def classification_metrics(
    labels: np.ndarray, predictions: np.ndarray, classes: tuple[str, ...]
) -> dict[str, Any]:
    """Accuracy, macro-F1, precision, recall and F1 per class, and the confusion matrix.

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
