"""How every benchmark times, weighs and records."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

PEAK_FLOPS = 700e12  # a bf16 product on an H100, measured at 4096 to 8192
PEAK_BYTES = 3e12  # a device copy, read and written


def graph_time(calls: Sequence[Callable[[], object]], repeats: int = 4, replays: int = 15) -> float:
    """GPU time per call in µs: median over replays of a CUDA graph of all ``calls`` in turn.

    Give one call per set of inputs, and more bytes than the L2 cache holds over all of them:
    a single buffer would measure the cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3 / (repeats * len(calls))


def wall_time(call: Callable[[], object], repeats: int = 50) -> float:
    """Wall time of one eager call, launch to completion, in µs; median."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def peak_memory(call: Callable[[], object]) -> float:
    """MiB that one call allocates at most beyond what was there before."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def input_sets(bytes_per_set: int, most: int = 8) -> int:
    """How many sets of inputs are worth four times an H100's L2 cache."""
    return max(2, min(most, 200_000_000 // max(1, bytes_per_set)))


def floor(flops: float, moved: float) -> float:
    """The larger of the times for the operations and for the bytes, in µs."""
    return max(flops / PEAK_FLOPS, moved / PEAK_BYTES) * 1e6


def environment() -> dict:
    """Commit, GPU and versions: what a result is worth nothing without."""
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["fastadapt bench", *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        import triton

        result["triton"] = triton.__version__
    except ImportError:
        result["triton"] = None
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
        result["cuda"] = torch.version.cuda
    return result


def _commit() -> str | None:
    if "FASTADAPT_COMMIT" in os.environ:  # a copy without its repository
        return os.environ["FASTADAPT_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def markdown_table(rows: list[dict]) -> str:
    """Rows of one shape of keys as a Markdown table."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [row.get(head) for head in heads]
        lines.append("| " + " | ".join("–" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines)


def write_results(path: str, results: dict) -> None:
    """``results`` as JSON, and its tables as Markdown beside it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    parts = ["# Benchmark results", ""]
    parts += [f"- {key}: {value}" for key, value in results["environment"].items()]
    for name, result in results["benchmarks"].items():
        for title, rows in result["tables"].items():
            parts += ["", f"## {name}: {title}", "", markdown_table(rows)]
        parts += ["", *result.get("notes", [])]
    target.with_suffix(".md").write_text("\n".join(parts).rstrip() + "\n")
