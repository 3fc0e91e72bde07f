"""``python -m fastadapt.bench``."""

import runpy


def test_a_process_that_a_benchmark_starts_runs_no_benchmarks():
    """Spawned processes import the main module again, under this name."""
    runpy.run_module("fastadapt.bench.__main__", run_name="__mp_main__")
