import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastadapt.train.linear_probe import STRENGTHS, linear_probe

CLASSES = ("a", "b", "c")


def drawn(splits=("train", "val", "test"), classes=3, seed=0):
    """Features that know something of the class, with means and scales of their own."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, 20))
    features, labels = {}, {}
    for split in splits:
        labels[split] = rng.integers(classes, size=90)
        x = centers[labels[split]] + 2.5 * rng.normal(size=(90, 20))
        features[split] = (100 * x * rng.uniform(1, 2) + 7).astype(np.float32)
    return features, labels


def test_it_equals_scikit_learn_with_c_chosen_on_validation():
    x, y = drawn()
    found = linear_probe(x, y, CLASSES)

    def fitted(c, *splits):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
        return model.fit(
            np.concatenate([x[s] for s in splits]), np.concatenate([y[s] for s in splits])
        )

    on_val = {c: fitted(c, "train").score(x["val"], y["val"]) for c in STRENGTHS}
    assert found["C"] == max(on_val, key=lambda c: on_val[c])
    assert found["val"]["accuracy"] == pytest.approx(max(on_val.values()))
    test = fitted(found["C"], "train", "val").score(x["test"], y["test"])
    assert found["test"]["accuracy"] == pytest.approx(test)
    assert found["test"]["auroc"] > 0.6 and found["test"]["images"] == 90


def test_without_a_test_split_and_without_images_of_a_class():
    x, y = drawn(("train", "val"), classes=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = linear_probe(x, {split: 2 * labels for split, labels in y.items()}, CLASSES)
    assert "test" not in found
    assert found["val"]["per_class"]["b"]["images"] == 0
    assert np.array(found["val"]["confusion"])[[0, 2]].sum() == 90
