"""Benchmarks: a timing harness, providers side by side, results with provenance."""

from __future__ import annotations

import importlib
import sys

from fastadapt.errors import InputError

# Name to module; a module has `run(quick) -> {"tables": {title: rows}, "notes": [...]}`.
BENCHMARKS = {
    "cluster_attention": "fastadapt.bench.cluster_attention",
    "cladapter": "fastadapt.bench.cladapter",
    "deployment": "fastadapt.bench.deployment",
}


def run(names: list[str], *, quick: bool = False, json_out: str | None = None) -> int:
    """Runs benchmarks by name (all, if none is named) and prints their tables.

    Args:
        names: keys of ``BENCHMARKS``.
        quick: fewer shapes.
        json_out: write the results there, and as Markdown beside it.

    Returns:
        An exit code: 0, or 1 if a kernel's result was wrong.

    Raises:
        InputError: no such benchmark.
    """
    for name in names:
        if name not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise InputError(f"no benchmark is called {name!r}; there are {known}")
    names = names or list(BENCHMARKS)

    import torch

    if not torch.cuda.is_available():
        print(f"Left out, since they need a CUDA GPU: {', '.join(names)}", file=sys.stderr)
        return 0
    from fastadapt.bench import harness

    results = {"environment": harness.environment(), "benchmarks": {}}
    wrong = False
    for name in names:
        result = importlib.import_module(BENCHMARKS[name]).run(quick=quick)
        wrong |= bool(result.get("wrong"))
        results["benchmarks"][name] = result
        for title, rows in result["tables"].items():
            print(f"\n{name}: {title}\n\n{harness.markdown_table(rows)}", flush=True)
    if json_out is not None:
        harness.write_results(json_out, results)
    return int(wrong)
