"""Passes over streamed images may be left early or run at once: each gives its own images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadapt.data.dataset import read_dataset
from fastadapt.data.images import ImageSource
from fastadapt.data.preprocess import Preprocess
from tests.helpers.imagesets import make_folders

PREPROCESS = Preprocess((3, 32, 32))


@pytest.fixture(scope="module")
def both_sources(tmp_path_factory):
    """Give images that are kept, and the same ones streamed."""
    folder = make_folders(tmp_path_factory.mktemp("sources") / "data", 8)
    samples = read_dataset(folder).split("train")
    kept, streamed = (
        ImageSource(samples, PREPROCESS, torch.device("cpu"), 2, resident=resident)
        for resident in (None, False)
    )
    yield kept, streamed
    streamed._decode_pool.close()


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_passes_that_are_left_early_or_run_at_once(both_sources, data):
    kept, streamed = both_sources
    rows = np.arange(len(kept.labels))
    passes = []
    for _ in range(data.draw(st.integers(2, 12), "steps")):
        if not passes or data.draw(st.booleans(), "another pass"):
            order = np.array(data.draw(st.permutations(rows), "order"))
            size = data.draw(st.sampled_from([1, 3, 4]), "batch size")
            passes.append([s.batches(order, None, size) for s in (kept, streamed)])
        chosen = data.draw(st.integers(0, len(passes) - 1), "pass")
        for _ in range(data.draw(st.integers(1, 6), "batches")):
            one, other = (next(batches, None) for batches in passes[chosen])
            assert (one is None) == (other is None)
            if one is not None:
                assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        if data.draw(st.booleans(), "leave it"):
            passes.pop(chosen)
