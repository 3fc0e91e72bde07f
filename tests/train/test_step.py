"""Tests of a training step's losses."""

import math

import pytest
import torch

from fastadapt.train.step import Losses


class TestLosses:
    def test_losses_are_summed_over_images_and_checked(self):
        seen = []
        losses = Losses(lambda loss, step: seen.append((loss, step)))
        for index in range(3):
            losses.add(torch.tensor(float(index)), 10)
        assert losses.total() == 30.0 and losses.note == "loss 2.000"
        assert seen == [(0.0, 1), (1.0, 2), (2.0, 3)]

    def test_those_of_a_gpu_are_read_every_few_steps(self):
        class OnGPU(torch.Tensor):
            is_cuda = True

        def check(loss, step):
            assert math.isfinite(loss), step

        losses = Losses(check)
        for index in range(Losses.EVERY - 1):
            losses.add(torch.tensor(math.nan if index == 4 else 1.0).as_subclass(OnGPU), 2)
        assert losses.note == ""
        with pytest.raises(AssertionError, match="5"):
            losses.total()
