import pytest

import fastadapt as fa
from fastadapt.errors import InputError
from fastadapt.train.config import TrainConfig
from fastadapt.train.search_config import SearchConfig
from fastadapt.train.search_space import Between, Space


class Drawn:
    """Stands for optuna's trial: the lowest value of every range, the last of every list."""

    def suggest_float(self, name, low, high, log):
        assert log
        return low

    def suggest_categorical(self, name, values):
        return values[-1]


def test_what_is_given_is_held_and_the_first_trial_is_as_given():
    config = TrainConfig(lr=5e-4, weight_decay=0.0, augment="flips", views=4, batch_size=7)
    adapt = fa.AdaptConfig(rank=100, mode="token")
    space = Space.around(config, adapt, {"depth", "epochs"}, ["a", "b"])
    assert "depth" not in space.varied and "epochs" not in space.varied
    assert space.varied["views"].values == (1, 4)
    first, head = space.first()
    assert first["rank"] == 128 and first["lr"] == 5e-4 and first["backbone"] == "a"
    assert first["weight_decay"] == space.varied["weight_decay"].low  # 0 has no logarithm
    assert head["adapter"] == "none" and set(head) == set(first) == set(space.varied)
    drawn = space.suggest(Drawn())
    training, adapter = space.settings(drawn)
    assert training.lr == 1e-4 and training.views == 4 and training.batch_size == 7
    assert adapter.adapter == "none" and adapter.mode == "token"
    plain, _ = space.settings({**drawn, "views": 1})
    assert plain.views == 1 and plain.augment == "none"
    alone = Space.around(config, fa.AdaptConfig(adapter="none"), {"adapter"})
    assert set(alone.varied) == {
        "lr",
        "weight_decay",
        "label_smoothing",
        "mixup",
        "epochs",
        "views",
    }
    assert isinstance(alone.varied["lr"], Between) and len(alone.first()) == 1


def test_backbones_are_named_once():
    how = SearchConfig(backbones="a, b=weights.safetensors")
    assert [
        (item.name, item.weights and item.weights.name) for item in how.named_backbones(None, None)
    ] == [("a", None), ("b", "weights.safetensors")]
    for backbones, backbone, message in (
        (None, None, "needs --backbone NAME"),
        ("a", "a", "not both"),
        ("a,a", None, "names one twice"),
        ("a,,b", None, "expected names with commas"),
    ):
        with pytest.raises(InputError, match=message):
            SearchConfig(backbones=backbones).named_backbones(backbone, None)
