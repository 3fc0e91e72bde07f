"""A few damaged bundles, as ``tools/fuzz.py`` makes hundreds."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.fuzz.bundles import Bundles
from tests.helpers.fuzz.target import RAW, WRONG, answer


def test_damaged_bundles_are_answered_rightly(made, tmp_path, tmp_path_factory):
    target = Bundles(tmp_path, made / "bundle")

    @settings(max_examples=8, derandomize=True, database=None)
    @given(st.randoms(use_true_random=False))
    def check(choose):
        found = answer(target, choose, tmp_path_factory.mktemp("damaged"))
        assert found.outcome not in (WRONG, RAW), found.detail

    check()
