import numpy as np
import pytest

from fastadapt.data.folds import (
    assign_folds,
    chosen_folds,
    fold_names,
    given_folds,
    joined_groups,
    missing_class,
    rotate,
)
from fastadapt.errors import InputError

CLASSES = ("crack", "fine")
LABELS = np.array([0] * 20 + [1] * 31)


def test_folds_have_the_classes_shares_and_follow_from_the_seed():
    folds = assign_folds(CLASSES, LABELS, 5, seed=3)
    assert np.bincount(folds[LABELS == 0]).tolist() == [4] * 5
    assert sorted(np.bincount(folds[LABELS == 1])) == [6, 6, 6, 6, 7]
    assert np.array_equal(folds, assign_folds(CLASSES, LABELS, 5, seed=3))
    assert not np.array_equal(folds, assign_folds(CLASSES, LABELS, 5, seed=4))


def test_a_group_is_in_one_fold_and_every_fold_has_every_class():
    rng = np.random.default_rng(0)
    groups = rng.integers(17, size=51)
    folds = assign_folds(CLASSES, LABELS, 4, 0, [f"patient {g}" for g in groups])
    for group in np.unique(groups):
        assert len(set(folds[groups == group])) == 1
    assert missing_class(folds, LABELS, 4, 2) is None


def test_every_image_is_held_out_once_and_validation_is_another_fold():
    folds = assign_folds(CLASSES, LABELS, 5)
    runs = rotate(folds, 5)
    assert sorted(np.concatenate([run.test for run in runs])) == list(range(51))
    for run in runs:
        assert (folds[run.test] == run.number).all()
        assert (folds[run.val] == (run.number + 1) % 5).all()
        assert sorted(np.concatenate(list(run.splits().values()))) == list(range(51))
    without = rotate(folds, 5, test=False)
    assert all(list(run.splits()) == ["train", "val"] for run in without)
    assert sorted(np.concatenate([run.val for run in without])) == list(range(51))
    assert list(rotate(folds % 2, 2)[0].splits()) == ["train", "val"]


@pytest.mark.parametrize(
    ("labels", "count", "groups", "message"),
    [
        (LABELS, 1, None, "folds is 1; expected 2"),
        (LABELS, 21, None, "class 'crack' has 20 images, too few for 21 folds"),
        (LABELS, 5, ["a"] * 51, "all 51 images are of one group, 'a'"),
        (LABELS, 5, [0, 1] * 10 + list(range(31)), "class 'crack' has 2 groups with images of it"),
        # Two groups hold a class each of three folds' worth; the third has both.
        ([0, 0, 1, 1, 0, 1], 2, list("aabbcc"), "of 2 has no image of class"),
    ],
)
def test_what_cannot_be_dealt_is_refused(labels, count, groups, message):
    with pytest.raises(InputError, match=message):
        assign_folds(CLASSES, labels, count, 0, groups)


def test_folds_of_a_table():
    names = ["10", "2", "2", "1", "10"]
    assert fold_names(names) == ["1", "2", "10"]
    assert given_folds(names, 3).tolist() == [2, 1, 1, 0, 2]
    assert chosen_folds(names, "2", "10") == ["test", "val", "val", "train", "test"]
    assert chosen_folds(names, "2", None) == ["train", "val", "val", "train", "train"]
    with pytest.raises(InputError, match="folds is 5, but the column 'fold' has 3: 1, 2, 10"):
        given_folds(names, 5)
    with pytest.raises(InputError, match="val_fold is 3; the folds are 1, 2, 10"):
        chosen_folds(names, "3", None)
    with pytest.raises(InputError, match="both 2"):
        chosen_folds(names, "2", "2")
    with pytest.raises(InputError, match="none is left to train on"):
        chosen_folds(["1", "2"], "2", "1")


def test_groups_with_copies_of_each_other_are_one():
    groups, merged = joined_groups(list("aabbcd"), [(0, 2), (3, 4)])
    assert merged == 2
    assert len(set(groups[:5])) == 1 and groups[5] != groups[0]
    assert joined_groups(["x", "y"], []) == ([0, 1], 0)
