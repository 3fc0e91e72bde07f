"""Tables of one benchmark."""

from fastadapt.bench import operation
from fastadapt.bench.reporting import tables
from tests.helpers.bench_results import results_of, spread


def test_tables_name_baseline_floor_target_and_failures():
    result = results_of().benchmarks["cluster_attention"]
    found = tables.tables(result)
    row = found["forward, GPU time in µs"][0]
    assert row == {
        "batch × tokens": "1 × 2",
        "ours": "50.0 ± 0.2",
        "compiled": "80.0 ± 0.4",
        "ours over best baseline": "1.60× (compiled)",
        "floor": "20.0",
        "of floor": "40 %",
        "target (H100)": "40.0 / 30.0",
        "met": "no",
    }
    assert found["providers that failed"][0]["why"] == "out of memory"
    summary = tables.summary(result)[0]
    assert summary["forward, µs: ours / compiled"] == "50.0 / 80.0 (1.60×)"
    assert summary[f"{operation.BOTH}, MiB: ours / compiled"] == "10 / 20"


def test_targets_are_met_by_time_or_by_speedup():
    result = results_of(ours=35.0).benchmarks["cluster_attention"]
    backward = result.records[0].parts["backward"]
    backward.target_us, backward.target_speedup = (), (3, "compiled")
    found = tables.tables(result)
    assert found["forward, GPU time in µs"][0]["met"] == "first"
    assert found["backward, GPU time in µs"][0]["target (H100)"] == "3× compiled"
    assert found["backward, GPU time in µs"][0]["met"] == "no"


def test_no_ratio_where_the_spread_exceeds_the_median():
    result = results_of(width=1.2).benchmarks["cluster_attention"]
    result.records[0].parts["forward"].target_us = ()
    result.records[0].parts["forward"].target_speedup = (1.1, "compiled")
    row = tables.tables(result)["forward, GPU time in µs"][0]
    assert row["ours"] == "50.0 ± 30.0"
    assert row["ours over best baseline"] is None and row["met"] is None
    assert tables.summary(result)[0]["forward, µs: ours / compiled"] == "50.0 / 80.0"
    overview = tables.overview(results_of(width=1.2))
    assert all(row["times as fast"] is None for row in overview)
    assert all("×" not in str(row["over all shapes"]) for row in overview)


def test_the_overview_shows_where_ours_loses():
    results = results_of()
    result = results.benchmarks["cluster_attention"]
    result.records[1].parts["forward"].gpu_us["ours"] = spread(320.0, 0.01)
    forward, backward = tables.overview(results)
    assert forward["benchmark"] == "cluster_attention, forward"
    assert forward["over all shapes"] == "0.50 to 1.60×"
    assert backward["fastest baseline"] == "160.0 µs (compiled)"
