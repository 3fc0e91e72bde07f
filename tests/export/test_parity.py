import json

import numpy as np
import pytest
import torch

from fastadapt.export import compare
from fastadapt.export.parity import THRESHOLDS, Thresholds, check_problems

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(16, 5))


class TestCompare:
    def test_equal_outputs_pass(self):
        parity = compare(LOGITS, LOGITS.copy(), stage="s", batch=2)
        assert parity.passed
        assert parity.error == 0
        assert parity.cosine == pytest.approx(1)
        assert (parity.top1, parity.near_ties, parity.samples) == (1, 0, 16)
        json.dumps(parity.to_dict(), allow_nan=False)

    def test_takes_tensors(self):
        assert compare(torch.from_numpy(LOGITS), torch.from_numpy(LOGITS).float()).passed

    @pytest.mark.parametrize("scale,offset", [(1, 0), (1e-6, 0), (1e6, 0)])
    def test_error_is_relative_to_the_spread(self, scale, offset):
        moved = LOGITS.copy()
        moved[3, 2] += 0.01 * np.sqrt(LOGITS.var(axis=0).mean())
        parity = compare(scale * LOGITS, scale * moved)
        assert parity.error == pytest.approx(0.01)
        assert check_problems([parity])[0].startswith(" at batch 0: error 1.0e-02 of the spread")

    def test_a_common_offset_hides_nothing(self):
        moved = LOGITS.copy()
        moved[3, 2] += 0.01
        assert compare(LOGITS, moved).error == pytest.approx(compare(LOGITS + 50, moved + 50).error)

    def test_outputs_that_do_not_vary_fail(self):
        constant = np.tile(LOGITS[:1], (16, 1))
        for reference in (constant, np.zeros((16, 5)), constant + 1e-7 * LOGITS):
            parity = compare(reference, reference)
            assert not parity.passed
            assert "agreement says nothing" in parity.problems[0]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("which", [0, 1])
    def test_not_finite_fails(self, value, which):
        pair = [LOGITS.copy(), LOGITS.copy()]
        pair[which][7, 1] = value
        parity = compare(*pair)
        assert "NaN or infinity for 1 of 16 samples" in parity.problems[0]
        json.dumps(parity.to_dict(), allow_nan=False)

    def test_shapes_that_differ_fail(self):
        assert "differ" in compare(LOGITS, LOGITS[:, :4]).problems[0]

    def test_another_class_fails_unless_it_is_a_near_tie(self):
        tie = LOGITS.copy()
        tie[0, :2] = LOGITS[0].max() + np.array([1.0, 1.0 + 1e-5])
        flipped = tie.copy()
        flipped[0, :2] = flipped[0, 1::-1]
        parity = compare(tie, flipped)
        assert parity.passed
        assert (parity.near_ties, parity.top1) == (1, 1)
        swapped = tie.copy()
        swapped[1] = swapped[1, ::-1]
        parity = compare(tie, swapped)
        assert any("another class" in problem for problem in parity.problems)

    def test_features_have_no_classes(self):
        parity = compare(LOGITS, LOGITS, classes=False)
        assert parity.passed
        assert parity.top1 is None

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_what_is_near_the_origin_has_no_direction(self, precision):
        limits = THRESHOLDS[precision]
        spread = np.sqrt(LOGITS.var(axis=0).mean())
        undecided, turned = LOGITS.copy(), LOGITS.copy()
        undecided[0] = 0.9 * limits.origin * spread * np.array([1, -1, 1, -1, 1])
        turned[0] = undecided[0] + 0.9 * limits.error * spread * np.array([1, 1, -1, -1, 1])
        assert compare(undecided, turned, thresholds=limits).passed
        # Whatever happens, some output is far enough from it to be judged.
        small = 1e-3 * LOGITS
        assert compare(small, small, thresholds=Thresholds(origin=1.0)).cosine == pytest.approx(1)

    def test_thresholds_are_the_callers(self):
        moved = LOGITS + 1e-4
        assert compare(LOGITS, moved).passed
        assert not compare(LOGITS, moved, thresholds=Thresholds(error=1e-6)).passed
