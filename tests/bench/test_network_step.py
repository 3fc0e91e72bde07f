"""Whole steps of a network."""

import torch

from fastadapt.bench import network_step as steps
from fastadapt.bench.protocol import Record, Result
from fastadapt.bench.reporting import tables


def test_a_step_that_does_not_fit_is_said(monkeypatch):
    def full():
        raise torch.OutOfMemoryError("no memory")

    part = steps.part({"upstream": steps.measure(full), "ours": steps.measure(lambda: None)})
    assert part.failed == {"upstream": "out of memory"}
    assert set(part.wall_us) == {"ours"}
    record = Record("1", "n", 1, parts={"step": part})
    found = tables.tables(Result(records=[record]))
    assert found["providers that failed"][0]["provider"] == "upstream, step"
