import warnings

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk

from fastadapt.train.metrics import (
    accuracy_interval,
    calibration_error,
    classification_metrics,
    scores,
)
from fastadapt.train.plots import plot_confusion, plot_evaluation


def drawn(images, classes, seed=0):
    """Labels, probabilities that know something of them, and predictions."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    logits = rng.normal(size=(images, classes)) + 1.5 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels, probabilities.argmax(1), probabilities


def test_metrics_equal_those_worked_by_hand(tmp_path):
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    found = classification_metrics(labels, predicted, ("a", "b", "c", "d"))
    assert found["confusion"] == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["per_class"]["a"] == {
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "images": 3,
    }
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    plot_confusion(found["confusion"], ("a", "b", "c", "d"), tmp_path / "confusion.png", "val")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("classes", [2, 5])
def test_scores_equal_scikit_learn(classes):
    labels, predicted, probabilities = drawn(75, classes)
    names = tuple("abcde"[:classes])
    found = scores(labels, predicted, probabilities, names)
    light = classification_metrics(labels, predicted, names)
    assert {k: v for k, v in light.items() if k != "per_class"}.items() <= found.items()
    for name in names:
        assert light["per_class"][name].items() <= found["per_class"][name].items()
    precision = sk.precision_score(labels, predicted, average="macro")
    recall = sk.recall_score(labels, predicted, average="macro")
    assert found["macro_f1"] == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert found["macro_precision"] == pytest.approx(precision)
    assert found["macro_recall"] == pytest.approx(recall)
    assert found["f1_of_means"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert found["f1_of_means"] != pytest.approx(found["macro_f1"], abs=1e-6)
    assert found["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(labels, predicted)
    )
    assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, predicted))
    assert found["cohen_kappa"] == pytest.approx(sk.cohen_kappa_score(labels, predicted))
    if classes == 2:
        auroc = sk.roc_auc_score(labels, probabilities[:, 1])
        precision = sk.average_precision_score(labels, probabilities[:, 1])
    else:
        auroc = sk.roc_auc_score(labels, probabilities, multi_class="ovr")
        precision = sk.average_precision_score(np.eye(classes)[labels], probabilities)
    assert found["auroc"] == pytest.approx(auroc)
    assert found["average_precision"] == pytest.approx(precision)
    assert found["undefined"] == {}


def test_what_a_split_does_not_define_is_none_with_a_reason():
    labels, predicted, probabilities = drawn(40, 3)
    probabilities = np.concatenate([probabilities, np.zeros((40, 1))], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(labels, predicted, probabilities, ("a", "b", "c", "never there"))
        one = scores(labels * 0, labels * 0, probabilities[:, :2], ("a", "b"))
        broken = scores(labels, predicted, probabilities * np.nan, ("a", "b", "c", "d"))
    assert found["per_class"]["never there"]["auroc"] is None
    defined = [found["per_class"][name]["auroc"] for name in "abc"]
    assert found["auroc"] == pytest.approx(np.mean(defined))
    assert "never there" in found["undefined"]["auroc"]
    for key in ("mcc", "cohen_kappa", "auroc", "average_precision"):
        assert one[key] is None and one["undefined"][key]
    assert one["accuracy"] == one["balanced_accuracy"] == 1
    for key in ("ece", "auroc", "average_precision"):
        assert broken[key] is None and "NaN" in broken["undefined"][key]
    assert broken["accuracy"] == found["accuracy"]


def test_interval_is_that_of_resampled_images():
    right = np.arange(200) < 170
    rng = np.random.default_rng(1)
    resampled = right[rng.integers(200, size=(4000, 200))].mean(1)
    low, high = accuracy_interval(0.85, 200)
    assert [low, high] == pytest.approx(np.percentile(resampled, (2.5, 97.5)), abs=0.006)
    assert [low, high] == accuracy_interval(0.85, 200)
    assert accuracy_interval(1.0, 10) == [1.0, 1.0]


def test_calibration_error_equals_one_worked_by_hand():
    # Two in the bin of 0.9, one of them right; two in that of 0.6, both right; 1.0 has a bin, too.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.0, 1.0]])
    labels = np.array([0, 1, 1, 0, 1])
    expected = (abs(1 - 1.8) + abs(2 - 1.2) + 0) / 5
    assert calibration_error(labels, probabilities) == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_letters_that_the_font_lacks_are_no_warning(tmp_path):
    labels, predicted, probabilities = drawn(20, 2)
    classes = ("\u88c2\u7eb9", "\U0001f600")
    found = scores(labels, predicted, probabilities, classes)
    plot_evaluation(tmp_path / "e.png", "val", found, labels, probabilities, classes)
    assert (tmp_path / "e.png").stat().st_size > 1000
