import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from fastadapt.decision import LIKELIEST, UNDECIDED, Decision, choose_decision
from fastadapt.errors import InputError


def drawn(images=400, share=0.2, seed=0):
    """Probabilities of two classes, the second rare, and never likely enough."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(images) < share).astype(int)
    p = 1 / (1 + np.exp(-(rng.normal(size=images) + 2 * labels - 2)))
    return np.stack([1 - p, p], 1), labels


@pytest.mark.parametrize("criterion", ["balanced_accuracy", "f1", "youden"])
def test_the_threshold_is_the_best_on_validation(criterion):
    probabilities, labels = drawn()
    decision, notes = choose_decision(probabilities, labels, criterion)
    score = metrics.f1_score if criterion == "f1" else metrics.balanced_accuracy_score
    found = score(labels, decision.classes(probabilities))
    every = [score(labels, probabilities[:, 1] > t) for t in np.linspace(0.01, 0.99, 99)]
    assert found >= max(every) > score(labels, probabilities.argmax(1))
    assert notes == [] and not decision.plain and decision.threshold != 0.5


def test_of_equal_thresholds_that_nearest_to_one_half_is_taken():
    p = np.array([0.05, 0.1, 0.9, 0.95])
    decision, _ = choose_decision(np.stack([1 - p, p], 1), np.array([0, 0, 1, 1]), "f1")
    assert decision.threshold == 0.5


def test_what_cannot_be_chosen_is_said_or_refused():
    probabilities, labels = drawn()
    decision, notes = choose_decision(probabilities, 0 * labels, "f1")
    assert decision.threshold == 0.5 and "one class only" in notes[0]
    decision, notes = choose_decision(probabilities * np.nan, labels, "f1")
    assert decision.plain and "NaN" in notes[0]
    with pytest.raises(InputError, match="threshold is 'f1', which is for two classes, and the d"):
        choose_decision(np.full((3, 3), 1 / 3), np.arange(3), "f1")


def test_the_least_certain_images_are_left_undecided():
    probabilities, labels = drawn()
    decision, _ = choose_decision(probabilities, labels, "balanced_accuracy", 0.15)
    assert decision.undecided(probabilities).sum() == 60
    low, high = decision.band
    assert low < decision.threshold < high
    decided = decision.decide(probabilities)
    assert (decided == UNDECIDED).sum() == 60
    kept = decided != UNDECIDED
    classes = decision.classes(probabilities)
    assert (decided[kept] == classes[kept]).all()
    assert (classes == labels)[kept].mean() > (classes == labels).mean()

    rng = np.random.default_rng(0)
    three = rng.dirichlet(np.ones(3), 100)
    decision, _ = choose_decision(three, rng.integers(3, size=100), abstain=0.1)
    assert decision.undecided(three).sum() == 10 and decision.band is None
    assert (decision.classes(three) == three.argmax(1)).all()
    nothing, _ = choose_decision(three[:3], np.arange(3), abstain=0.1)
    assert not nothing.undecided(three[:3]).any()


def test_it_is_what_a_file_holds():
    for decision in (Decision(), Decision("f1", 0.3, 0.1, (0.2, 0.4)), Decision(confidence=0.6)):
        assert Decision.from_dict(decision.to_dict(), "file") == decision
    assert Decision.from_dict(None, "file").plain
    assert str(Decision("f1", 0.3, 0.1, (0.2, 0.4))) == (
        "second class above 0.300 (f1), undecided between 0.200 and 0.400"
    )
    for values, message in (
        ([], "expected a JSON object"),
        ({"threshold": 2}, "threshold is 2; expected 0–1"),
        ({"band": [0.1]}, "expected two of 0–1"),
        ({"criterion": "best"}, "criterion is 'best'"),
    ):
        with pytest.raises(InputError, match=message):
            Decision.from_dict(values, "file")


LOGITS = st.sampled_from((0.0, 1.0, -2.0, 1e38, np.nan, np.inf, -np.inf))


@given(rows=st.lists(st.lists(LOGITS, min_size=2, max_size=2), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("decision", [LIKELIEST, Decision(threshold=0.7, band=(0.6, 0.8))])
def test_what_is_no_number_is_of_no_class(decision, rows):
    logits = np.array(rows, np.float32)
    with np.errstate(invalid="ignore"):
        powers = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
        shares = powers / powers.sum(1, keepdims=True)
    with np.errstate(all="raise", under="ignore"):
        found = decision.of_logits(logits)
    unknown = np.isnan(shares).any(1)
    assert (found[unknown] == UNDECIDED).all()
    np.testing.assert_array_equal(found[~unknown], decision.decide(shares[~unknown]))
