"""Benchmarks: one registry, one harness, one report; results with provenance in ``results/``.

A benchmark is a module with ``TITLE``, ``NOTES`` and ``run(quick)``, which yields a record per
shape (:func:`fastadapt.bench.operation.measure` makes them), or ``{"left_out": reason}``. A module
with tables of its own returns ``{"tables": {title: rows}, "notes": [...], "wrong": ...}`` instead,
with ``"readme"``, the titles that the README shows (all if not given), and ``"records"`` if it
wants to be in pictures and compared with earlier runs. One that takes long yields that dictionary,
whole, as often as it has something new, with ``"progress"``, what that is. One that can run in
parts says in ``"about"`` how the titles and lines of this part begin; what a run of the same commit
had of other parts stays.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from fastadapt.errors import InputError

# Name to whether it runs without a GPU, in the order of a whole run.
BENCHMARKS = {
    "cluster_attention": True,
    "cladapter": True,
    "quaternion_linear": True,
    "prompt_learner": True,
    "training": True,
    "gdpl": True,
}
if importlib.util.find_spec(f"{__name__}.suites.deployment"):
    BENCHMARKS["deployment"] = False
SLOW = ("deployment",)  # also with few shapes
SCHEMA = 1


def run(
    names: list[str],
    *,
    quick: bool = False,
    json_out: str | Path | None = None,
    compare: str | None = None,
    threshold: float = 5.0,
    plot: bool = False,
    command: str = "fastadapt bench",
) -> int:
    """Runs benchmarks by name (all, if none is named) and prints their tables.

    Args:
        names: keys of ``BENCHMARKS``.
        quick: fewer shapes; what compiles for minutes even so, only if it is named.
        json_out: write the results there after every shape, and at the end as Markdown beside it;
            in a folder, the file is named after machine and commit. Results of other benchmarks
            that are there from the same machine, commit and versions stay.
        compare: results to compare with: a file, or the commit of one under ``results/``.
        threshold: in percent; a slowdown of ours beyond it, and beyond noise, is a failure.
        plot: pictures beside ``json_out``.
        command: noted in the results.

    Returns:
        An exit code: 0; or 1 if a result was wrong, a benchmark failed, or ours got slower.

    Raises:
        InputError: no such benchmark, no such results, ``plot`` without ``json_out``.
    """
    for name in names:
        if name not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            raise InputError(f"no benchmark is called {name!r}; there are {known}")
    if plot and json_out is None:
        raise InputError("--plot needs --json OUT: the pictures are written beside that file")

    import torch

    from . import harness
    from .reporting import comparison
    from .reporting import tables as report

    before = None if compare is None else comparison.load(compare)
    environment = harness.environment(command)
    results: dict[str, Any] = {"schema": SCHEMA, "environment": environment, "benchmarks": {}}
    path = None if json_out is None else report.result_path(Path(json_out), environment)
    if path is not None:
        report.keep_earlier(path, results)
    for name in names or list(BENCHMARKS):
        if quick and not names and name in SLOW:
            _say(f"{name}: left out, it compiles for minutes; name it to have it")
            results["benchmarks"][name] = {"left_out": ["it compiles for minutes"]}
            continue
        if not (torch.cuda.is_available() or BENCHMARKS[name]):
            _say(f"{name}: left out, it needs a CUDA GPU")
            results["benchmarks"][name] = {"left_out": ["it needs a CUDA GPU"]}
            continue
        _run_one(name, quick, results, path)
        for title, rows in report.tables(results["benchmarks"][name]).items():
            print(f"\n{name}: {title}\n\n{report.markdown_table(rows)}\n", flush=True)
    if not torch.cuda.is_available():
        _say("left out, since they need a CUDA GPU: GPU time, peak memory, Triton, torch.compile")
    if path is not None:
        report.write_markdown(path, results)
        _say(f"wrote {path}")
    if plot:
        from .reporting.plots import write_plots

        for picture in write_plots(path, results):
            _say(f"wrote {picture}")
    run_now = [results["benchmarks"][name] for name in names or BENCHMARKS]
    bad = any(r.get("wrong") or r.get("failed") for r in run_now)
    if before is not None:
        changes = comparison.changes(before, results)
        print(comparison.as_text(changes, threshold))
        bad |= comparison.worse(changes, threshold)
    return int(bad)


def _run_one(name: str, quick: bool, results: dict[str, Any], path: Path | None) -> None:
    """Runs one benchmark into ``results``; they are written after every shape."""
    from fastadapt.files import write_json

    from . import harness
    from .reporting import tables as report

    started = time.perf_counter()
    earlier = results["benchmarks"].get(name, {})
    result: dict[str, Any] = {}
    results["benchmarks"][name] = result
    try:
        module = importlib.import_module(f"{__name__}.suites.{name}")
        made = module.run(quick=quick)
        for item in [made] if isinstance(made, dict) else made:
            said = _add(item, result, module, earlier)
            _say(f"{name}: {said}, {time.perf_counter() - started:.0f} s")
            if path is not None:
                write_json(path, results)
    except Exception as error:  # the other benchmarks' results are worth having
        result["failed"] = report.one_line(error)
        _say(f"{name}: FAILED, {result['failed']}")
    harness.release()
    if path is not None:
        write_json(path, results)


def _add(
    item: dict[str, Any], result: dict[str, Any], module: ModuleType, earlier: dict[str, Any]
) -> str:
    """What a benchmark yields into its result; returns what to say of it."""
    if "tables" in item:
        from .reporting import tables as report

        result.clear()
        result |= report.joined(earlier, item)
        return result.pop("progress", "tables")
    result.setdefault("title", module.TITLE)
    result.setdefault("notes", [module.NOTES])
    records = result.setdefault("records", [])
    if "left_out" in item:
        result.setdefault("left_out", []).append(item["left_out"])
        return f"left out, {item['left_out']}"
    records.append(item)
    if item.get("wrong"):
        result.setdefault("wrong", []).append(item["shape"])
    return item["shape"]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
