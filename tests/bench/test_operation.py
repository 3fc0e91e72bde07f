"""One operation at one shape: refused where it is wrong, timed where it is right."""

import dataclasses

import pytest

from fastadapt.bench import harness, operation
from fastadapt.bench.protocol import Result
from fastadapt.bench.reporting import tables
from fastadapt.bench.suites import cluster_attention


def test_ours_is_checked_against_fp64_before_it_is_timed():
    good = cluster_attention.case(2, 5, 16)
    record = operation.measure(good)
    assert set(record.parts["forward"].wall_us) >= {"ours", "upstream"}
    assert record.errors["dtransforms"]["ours"] < 1e-2

    def off(*args):
        return good.providers["eager"].call(*args) * 1.001

    def breaks(*args):
        raise RuntimeError("no such\nkernel")

    providers = {**good.providers, "ours": operation.Provider(off)}
    record = operation.measure(_with(good, providers))
    assert not record.parts
    assert record.wrong["y"]["ours"] == pytest.approx(1e-3, rel=0.1)
    assert list(tables.tables(Result(records=[record]))) == [tables.WRONG]

    providers = {**good.providers, "upstream": operation.Provider(breaks)}
    record = operation.measure(_with(good, providers))
    assert record.failed == {"upstream": "RuntimeError: no such"}
    assert "upstream" not in record.parts["forward"].wall_us


def _with(case, providers):
    return dataclasses.replace(case, providers=providers)


def test_nan_is_wrong():
    good = cluster_attention.case(2, 5, 16)

    def nan(*args):
        return good.providers["eager"].call(*args) * float("nan")

    record = operation.measure(_with(good, {**good.providers, "ours": operation.Provider(nan)}))
    assert "y" in record.wrong and not record.parts


def test_a_backward_is_the_difference_of_graph_times(monkeypatch):
    took = iter([10.0, 30.0, 11.0, 40.0])  # forward, then both directions, of each provider

    def graph_times(calls, repeats):
        assert len(calls) == 2 and repeats >= 1
        for call in calls:
            call()
        return harness.spread([next(took)])

    monkeypatch.setattr(harness, "graph_times", graph_times)
    monkeypatch.setattr(harness, "peak_memory", lambda call: 3.0)
    case = cluster_attention.case(2, 5, 16)
    providers = {name: case.providers[name] for name in ("ours", "eager", "upstream")}
    parts = operation.measure(_with(case, providers)).parts
    assert parts["backward"].gpu_us["ours"].median == 20.0
    assert parts["backward"].gpu_us["upstream"].median == 29.0
    assert parts[operation.BOTH].peak_mib == {"ours": 3.0, "upstream": 3.0}


@pytest.mark.gpu
def test_a_gpu_gives_graph_times_and_memory():
    case = cluster_attention.case(8, 49, 256)
    eager = case.providers["eager"]
    record = operation.measure(_with(case, {"ours": eager, "eager": eager}))
    forward = record.parts["forward"]
    assert 0 < forward.gpu_us["ours"].median < forward.wall_us["ours"].median
    assert forward.peak_mib["ours"] > 0
    assert record.parts["backward"].gpu_us["ours"].median > 0
