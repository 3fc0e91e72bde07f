"""Fit a linear probe: logistic regression on pooled frozen features, what an adapter must beat."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from fastadapt.train.metrics import classification_metrics, scores

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C: the inverse of the penalty's weight
ITERATIONS = 200
# Training images times channels times classes: 2,000 × 1,280 features of two classes take half a
# second, and beyond this the fits would take minutes.
LARGEST = 500_000_000


def linear_probe(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray], classes: tuple[str, ...]
) -> dict[str, Any]:
    """Fit and measure a logistic regression, in its strongest form.

    Features are standardised and C is chosen on validation. The scores on validation are those of
    the fit to training, those on test of a second one to training and validation together.

    Args:
        features: [n, C] by split: train, val and, where there is one, test.
        labels: [n] by split.
        classes: their names.

    Returns:
        ``C``, and what :func:`fastadapt.train.metrics.scores` gives for val and test.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    def fitted(c: float, *splits: str) -> Any:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=ITERATIONS))
        x = np.concatenate([features[split] for split in splits])
        with warnings.catch_warnings():  # validation judges it as it is
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(x, np.concatenate([labels[split] for split in splits]))

    def measured(model: Any, split: str) -> dict[str, Any]:
        known = model.predict_proba(features[split])
        probabilities = np.zeros((len(known), len(classes)))
        probabilities[:, model.classes_] = known  # a class may have no training image
        return scores(labels[split], probabilities.argmax(1), probabilities, classes)

    # Such small products gain nothing from threads, which a busy machine lets wait for each other.
    with threadpool_limits(1):
        models = {c: fitted(c, "train") for c in STRENGTHS}
        # Of equal ones the first, which is penalised most.
        best = max(models, key=lambda c: models[c].score(features["val"], labels["val"]))
        result = {"C": best, "val": measured(models[best], "val")}
        if "test" in features:
            result["test"] = measured(fitted(best, "train", "val"), "test")
    return result


def probe_by_folds(
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    metric: str,
    classes: tuple[str, ...],
) -> float:
    """Return the mean score of the logistic regression over folds, of the best C.

    Args:
        features: [n, C].
        labels: [n], indices into ``classes``.
        folds: [n], the fold that each image is held out in.
        metric: ``"accuracy"``, ``"macro_f1"`` or ``"loss"`` (then the negative one).
        classes: names.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    means = []
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for c in STRENGTHS:
            found = []
            for fold in np.unique(folds):
                model = make_pipeline(
                    StandardScaler(), LogisticRegression(C=c, max_iter=ITERATIONS)
                )
                held_out = folds == fold
                model.fit(features[~held_out], labels[~held_out])
                x, y = features[held_out], labels[held_out]
                if metric == "loss":
                    found.append(-log_loss(y, model.predict_proba(x), labels=model.classes_))
                else:
                    found.append(classification_metrics(y, model.predict(x), classes)[metric])
            means.append(float(np.mean(found)))
    return max(means)
