"""The estimate counts what a run has to do."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import timm

import fastadapt as fa
from fastadapt.train.config import TrainConfig
from fastadapt.train.estimate import Work, duration_text, estimate_line, seconds_needed

WORK = Work(features=100, trained=60, validated=20, kept=2**30)


def test_time_is_that_of_all_passes():
    config = TrainConfig(epochs=10, epochs2=2)
    cached = seconds_needed(WORK, config, backbone=0.1, adapter=0.01, cached=True)
    assert cached == pytest.approx(100 * 0.1 + 10 * (60 * 3 + 20) * 0.01)
    both = seconds_needed(WORK, replace(config, stages=2), 0.1, 0.01, True)
    assert both == pytest.approx(cached + 2 * (60 * 3 + 20) * 0.11)
    again = seconds_needed(WORK, replace(config, refit=True), 0.1, 0.01, True)
    assert again == pytest.approx(cached + 10 * 80 * 3 * 0.01)
    fresh = seconds_needed(WORK._replace(features=0), config, 0.1, 0.01, False)
    assert fresh == pytest.approx(10 * (60 * (0.1 + 0.03) + 20 * 0.11))


def test_a_line_names_time_memory_and_disk():
    backbone = timm.create_model("test_vit2", num_classes=0)
    model = fa.adapt(backbone, fa.AdaptConfig(rank=4), 2)
    model.train()
    line = estimate_line(model, TrainConfig(), WORK, 2, nullcontext)
    assert line.startswith("estimate: about ") and "1.0 GiB of memory" in line
    assert line.endswith("of disk")
    assert model.training and not model.backbone.training


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "10 s"), (64, "60 s"), (200, "3 min"), (9000, "2.5 h")]
)
def test_durations_are_coarse(seconds, text):
    assert duration_text(seconds) == text
