import numpy as np
import pytest

from fastadapt.data.splits import draw_val, draw_val_groups
from fastadapt.errors import InputError

CLASSES = ("a", "b")


def test_a_share_of_every_class_is_drawn():
    labels = [0] * 20 + [1] * 40
    drawn = draw_val(CLASSES, labels, 0.25, 0)
    assert sum(i < 20 for i in drawn) == 5 and len(drawn) == 15
    with pytest.raises(InputError, match="class 'b' has a single training image"):
        draw_val(CLASSES, [0, 0, 1], 0.25, 0)


@pytest.mark.parametrize("seed", range(5))
def test_whole_groups_are_drawn_near_the_share(seed):
    rng = np.random.default_rng(seed)
    groups = [f"patient {g}" for g in rng.integers(25, size=200)]
    labels = (rng.random(200) < 0.3).astype(int).tolist()
    drawn = draw_val_groups(CLASSES, labels, groups, 0.2, seed)
    inside = {groups[i] for i in drawn}
    assert drawn == {i for i, group in enumerate(groups) if group in inside}
    for label in (0, 1):
        members = [i for i, other in enumerate(labels) if other == label]
        assert 0.1 < sum(i in drawn for i in members) / len(members) < 0.35
    assert drawn == draw_val_groups(CLASSES, labels, groups, 0.2, seed)


def test_a_class_of_one_group_cannot_be_drawn():
    with pytest.raises(InputError, match=r"class 'b' cannot be in training .* groups \(1\)"):
        draw_val_groups(CLASSES, [0, 0, 0, 1, 1], list("xyzzz"), 0.2, 0)
    with pytest.raises(InputError, match="class 'a' cannot be"):
        draw_val_groups(CLASSES, [0, 0, 1, 1], ["all"] * 4, 0.2, 0)
