"""Times, spreads, floors and memory; on a CPU and a fake GPU."""

from contextlib import contextmanager

import pytest
import torch

from fastadapt.bench import harness
from fastadapt.bench.protocol import Spread


def test_spreads():
    found = harness.spread([float(i) for i in range(1, 12)])
    assert found == Spread(6.0, 2.0, 10.0)
    assert harness.spread([3.0]) == Spread(3.0, 3.0, 3.0)
    whole, part = Spread(10.0, 9.0, 12.0), Spread(4.0, 3.5, 5.0)
    assert harness.difference(whole, part) == Spread(6.0, 4.0, 8.5)


def test_wall_times_keep_to_their_budget():
    calls = []
    harness.wall_times(lambda: calls.append(1), repeats=7)
    assert len(calls) == 3 + 7
    calls.clear()
    harness.wall_times(lambda: calls.append(1), repeats=50, seconds=0.0, least=4)
    assert len(calls) == 3 + 4


class FakeGPU:
    """Counts calls; each takes 2 ms inside a graph."""

    def __init__(self):
        self.calls, self.captured, self.clock = [], 0, 0.0
        self.replays = 0

    def install(self, monkeypatch):
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = fake.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Stream:
            def wait_stream(self, other):
                pass

        class Graph:
            def replay(self):
                fake.replays += 1
                fake.clock += 2.0 * fake.captured

        @contextmanager
        def graph(_):
            before = len(fake.calls)
            yield
            fake.captured = len(fake.calls) - before

        @contextmanager
        def stream(_):
            yield

        for name, value in {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": graph,
            "stream": stream,
            "current_stream": Stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_graph_times_are_per_call_over_all_inputs(monkeypatch):
    gpu = FakeGPU()
    gpu.install(monkeypatch)
    calls = [lambda i=i: gpu.calls.append(i) for i in range(3)]
    found = harness.graph_times(calls, repeats=4, replays=5)
    assert gpu.captured == 12
    assert gpu.calls[-12:] == [0, 1, 2] * 4
    assert gpu.replays == 3 + 5
    assert found.median == pytest.approx(2000.0)
    assert harness.graph_time(calls) == pytest.approx(2000.0)


def test_inputs_exceed_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert harness.input_sets(2**30) == 2
    assert harness.input_sets(50 * 2**20) == 4
    assert harness.input_sets(1000, most=32) == 32


def test_the_floor_is_the_larger_time(monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda: {"flops": 1e12, "bytes": 1e9})
    assert harness.floor(1e12, 1e6) == pytest.approx(1e6)
    assert harness.floor(1e6, 1e9) == pytest.approx(1e6)


@pytest.mark.parametrize("rate", [4.567e-7, 0.03, 2.4251, 795.24])
def test_rates_keep_four_digits(rate):
    assert harness.four_digits(rate) == pytest.approx(rate, rel=1e-3)
