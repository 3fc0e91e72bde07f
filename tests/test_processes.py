"""Tests of how batches are split, and of what the environment says."""

import numpy as np
import pytest

from fastadapt.errors import InputError
from fastadapt.processes import (
    ALONE,
    VARIABLES,
    Place,
    place_from_environment,
    share_of,
    without_place,
)


@pytest.mark.parametrize(("count", "batch_size"), [(37, 8), (16, 8), (17, 9), (3, 8), (9, 8)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_shares_are_the_one_order_cut_into_pieces(count, batch_size, size):
    order = np.random.default_rng(0).permutation(count)
    shares = [share_of(order, batch_size, rank, size) for rank in range(size)]
    iterators = [iter(share.order) for share in shares]
    for index, start in enumerate(range(0, count, batch_size)):
        batch = order[start : start + batch_size].tolist()
        found = []
        for share, places in zip(shares, iterators, strict=True):
            mine = share.mine(index)
            assert mine <= share.batch_size
            found += [int(next(places)) for _ in range(mine)]
            if mine == 0:  # takes part with an image that does not count
                assert int(next(places)) == batch[0]
            elif start + batch_size <= count:
                assert mine == share.batch_size
            assert share.images(index) == len(batch)
        assert found == batch
    assert all(next(places, None) is None for places in iterators)


def test_one_process_has_all():
    order = np.arange(7)
    share = ALONE.share(order, 3)
    assert share.order is order and share.rows == ((3,), (3,), (1,))
    assert ALONE.on_first(lambda: 5) == 5 and ALONE.all_true(True)
    assert ALONE.gradient_sum(None) is None


def test_images_have_one_owner():
    paths = [f"/data/{i}.png" for i in range(40)]
    places = [Place(rank, 4, rank % 2, 2) for rank in range(4)]
    assert all(sum(place.owns(path) for place in places) == 1 for path in paths)
    assert all(sum(place.owns_here(path) for place in places[:2]) == 1 for path in paths)


def test_places(monkeypatch):
    for name in (*VARIABLES, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # of machines, says another program
    monkeypatch.setenv("RANK", "1")
    assert place_from_environment() == Place()
    for name, value in {"LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert place_from_environment() == Place(1, 4, 0, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert place_from_environment() == Place(1, 4, 1, 2)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(InputError, match="RANK=4, WORLD_SIZE=4"):
        place_from_environment()
    assert without_place({"RANK": "0", "LOCAL_WORLD_SIZE": "2", "HOME": "x"}) == {"HOME": "x"}
