"""Run benchmarks by name, write their results, and say what was left out, wrong or slower."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastadapt.errors import InputError

from .protocol import Benchmark, LeftOut, Outcome, Record, Result, Results

if TYPE_CHECKING:
    from .protocol import Environment

# The modules under suites/ that hold a benchmark, in the order of a whole run.
NAMES = (
    "cluster_attention",
    "cladapter",
    "quaternion_linear",
    "prompt_learner",
    "training",
    "gdpl",
    "transfer",
    "end_to_end",
    "streaming",
    "deployment",
    "cpu_runtimes",
    "scaling",
    "predict",
)


def load(name: str) -> Benchmark:
    """Import a benchmark's module and return its declaration.

    Raises:
        InputError: no benchmark is called so.
    """
    check_names([name])
    benchmark = importlib.import_module(f".suites.{name}", __package__).BENCHMARK
    assert isinstance(benchmark, Benchmark)
    return benchmark


def check_names(names: list[str]) -> None:
    """Refuse names that no benchmark has.

    Raises:
        InputError: it names the first of them, and the benchmarks there are.
    """
    for name in names:
        if name not in NAMES:
            known = ", ".join(NAMES)
            raise InputError(f"no benchmark is called {name!r}; there are {known}")


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
    """Run benchmarks by name (all, if none is named) and print their tables.

    Args:
        names: some of ``NAMES``.
        quick: fewer shapes; a benchmark that takes minutes even so runs only if it is named.
        json_out: write the results there after every shape, and at the end as Markdown beside it;
            in a folder, the file is ``MACHINE/results.json``. Results of other benchmarks that
            the file holds of the same GPU stay, each with the commit that it was measured at.
        compare: results to compare with: a file, a folder under ``results/``, or a commit that
            results under ``results/`` were measured at.
        threshold: in percent; a slowdown of ours beyond it, and beyond noise, is a failure.
        plot: draw pictures beside ``json_out``.
        command: what the user typed, noted in the results.

    Returns:
        An exit code: 0; or 1 if a result was wrong, a benchmark failed, or ours got slower.

    Raises:
        InputError: no such benchmark, no such results, ``plot`` without ``json_out``.
    """
    check_names(names)
    if plot and json_out is None:
        raise InputError("--plot needs --json OUT: the pictures are written beside that file")

    import torch

    from . import harness
    from .reporting import comparison, tables
    from .reporting import results as stored

    before = None if compare is None else comparison.load(compare)
    environment = harness.environment(command)
    path = None if json_out is None else stored.result_path(Path(json_out), environment.gpu)
    kept = Results(environment.gpu) if path is None else stored.read_earlier(path, environment.gpu)
    now = Results(environment.gpu)
    for name in names or NAMES:
        benchmark = load(name)
        if (reason := _left_out(benchmark, quick and not names)) is not None:
            say(f"{name}: left out, {reason}")
            now.benchmarks[name] = Result(title=benchmark.title, left_out=[reason])
            kept.benchmarks.setdefault(name, now.benchmarks[name])
            continue
        now.benchmarks[name] = _run_one(name, benchmark, quick, environment, kept, path)
        for title, rows in tables.tables(now.benchmarks[name]).items():
            print(f"\n{name}: {title}\n\n{tables.markdown_table(rows)}\n", flush=True)
    if not torch.cuda.is_available():
        say("left out, since they need a CUDA GPU: GPU time, peak memory, Triton, torch.compile")
    if path is not None:
        stored.write_markdown(path, kept)
        say(f"wrote {path}")
    if plot and path is not None:
        from .reporting.plots import write_plots

        for picture in write_plots(path, kept):
            say(f"wrote {picture}")
    bad = any(result.wrong or result.failed for result in now.benchmarks.values())
    if before is not None:
        changes = comparison.changes(before, now)
        print(comparison.as_text(changes, threshold))
        bad |= comparison.worse(changes, threshold)
    return int(bad)


def say(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def _left_out(benchmark: Benchmark, spare_slow: bool) -> str | None:
    """Return why a benchmark does not run here and now; ``None`` if it does."""
    import torch

    if spare_slow and benchmark.slow:
        return "it takes minutes; name it to have it"
    if benchmark.needs_gpu and not torch.cuda.is_available():
        return "it needs a CUDA GPU"
    return None


def _run_one(
    name: str,
    benchmark: Benchmark,
    quick: bool,
    environment: Environment,
    kept: Results,
    path: Path | None,
) -> Result:
    """Run one benchmark into ``kept``, which is written to ``path`` after every shape."""
    from . import harness
    from .reporting import results as stored
    from .reporting.tables import one_line

    started = time.perf_counter()
    earlier = kept.benchmarks.get(name, Result())
    result = Result(environment=environment)
    try:
        for outcome in benchmark.run(quick):
            result, said = _add(outcome, result, benchmark, earlier)
            kept.benchmarks[name] = result
            say(f"{name}: {said}, {time.perf_counter() - started:.0f} s")
            if path is not None:
                stored.write(path, kept)
    except Exception as error:  # the other benchmarks' results are worth having
        result.failed = one_line(error)
        say(f"{name}: FAILED, {result.failed}")
    kept.benchmarks[name] = result
    harness.release()
    if path is not None:
        stored.write(path, kept)
    return result


def _add(
    outcome: Outcome, result: Result, benchmark: Benchmark, earlier: Result
) -> tuple[Result, str]:
    """Return the result with what a benchmark has yielded, and what to say of it."""
    from .reporting import results as stored

    result.title = result.title or benchmark.title
    result.notes = result.notes or [benchmark.notes]
    if isinstance(outcome, LeftOut):
        result.left_out.append(outcome.reason)
        return result, f"left out, {outcome.reason}"
    if isinstance(outcome, Record):
        result.records.append(outcome)
        if outcome.wrong:
            result.wrong.append(outcome.shape)
        return result, outcome.shape
    return stored.join_parts(result, outcome, earlier), outcome.progress
