import numpy as np
import pytest
from sklearn import metrics

from fastadapt.train import intervals
from fastadapt.train.intervals import bootstrap_intervals


def drawn(images=300, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    logits = rng.normal(size=(images, classes)) + 1.5 * np.eye(classes)[labels]
    logits = logits.round(1)  # some are equal
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels, probabilities.argmax(1), probabilities


@pytest.mark.parametrize("classes", [2, 4])
def test_intervals_are_those_of_scikit_learn_resampled(classes):
    labels, predictions, probabilities = drawn(200, classes)
    found = bootstrap_intervals(labels, predictions, probabilities)
    rng, values = np.random.default_rng(1), []
    for _ in range(100):
        rows = rng.integers(200, size=200)
        y, p = labels[rows], probabilities[rows]
        score = p[:, 1] if classes == 2 else p
        values.append(
            (
                metrics.accuracy_score(y, predictions[rows]),
                metrics.balanced_accuracy_score(y, predictions[rows]),
                metrics.f1_score(y, predictions[rows], average="macro"),
                metrics.roc_auc_score(y, score, multi_class="ovr"),
            )
        )
    for name, column in zip(
        ("accuracy", "balanced_accuracy", "macro_f1", "auroc"), np.array(values).T, strict=True
    ):
        assert found[name] == pytest.approx(np.percentile(column, (2.5, 97.5)).tolist(), abs=0.03)


def test_groups_that_agree_widen_the_interval(monkeypatch):
    labels, predictions, probabilities = drawn()
    groups = np.where(labels == predictions, "right", "wrong").astype(object)
    groups = [f"{group} {index // 30}" for index, group in enumerate(groups)]
    alone = bootstrap_intervals(labels, predictions, probabilities)["accuracy"]
    together = bootstrap_intervals(labels, predictions, probabilities, groups)["accuracy"]
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    monkeypatch.setattr(intervals, "AT_ONCE", 7 * 300)  # in parts, the draws are the same
    assert bootstrap_intervals(labels, predictions, probabilities)["accuracy"] == alone


def test_what_is_undefined_is_left_out(monkeypatch):
    labels, predictions, probabilities = drawn()
    one = bootstrap_intervals(np.zeros_like(labels), predictions, probabilities)
    assert set(one) == {"accuracy", "balanced_accuracy", "macro_f1"}
    monkeypatch.setattr(intervals, "MOST_RANKED", 100)
    assert "auroc" not in bootstrap_intervals(labels, predictions, probabilities)
