"""Measure times, peak memory and errors the same way for every benchmark."""

from __future__ import annotations

import functools
import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from fastadapt.info import versions
from fastadapt.kernels.common.arithmetic import ceil_div

from .protocol import Environment, Spread

Call = Callable[[], object]


def device() -> torch.device:
    """Return the device that benchmarks run on: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """Return the dtype of timed operations: bf16 on a GPU; fp32 on a CPU (few have bf16 units)."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def spread(times: Sequence[float]) -> Spread:
    """Return median, first and last decile of samples; ``--compare`` takes them as noise."""
    if len(times) < 2:
        return Spread(times[0], times[0], times[0])
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Spread(statistics.median(times), deciles[0], deciles[-1])


def difference(whole: Spread, part: Spread) -> Spread:
    """Return the spread of ``whole − part``, as wide as both together."""
    return Spread(whole.median - part.median, whole.low - part.high, whole.high - part.low)


def graph_times(calls: Sequence[Call], repeats: int = 4, replays: int = 15) -> Spread:
    """Measure the GPU time per call in µs, over replays of a CUDA graph of all ``calls`` in turn.

    Give one call per set of inputs, and more bytes than the L2 cache holds over all of them
    (:func:`input_sets`): a single buffer would measure the cache.

    Returns:
        Their spread; each replay is one sample.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
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
        times.append(start.elapsed_time(end) * 1e3 / (repeats * len(calls)))
    return spread(times)


def graph_time(calls: Sequence[Call], repeats: int = 4, replays: int = 15) -> float:
    """Return the median of :func:`graph_times`."""
    return graph_times(calls, repeats, replays).median


def wall_times(call: Call, repeats: int = 50, seconds: float = 1.0, least: int = 5) -> Spread:
    """Measure the wall time of one call in µs, launch to completion.

    Args:
        call: what is timed.
        repeats: the largest number of samples.
        seconds: begin no further sample after this time, once there are ``least``.
        least: the smallest number of samples.

    Returns:
        Their spread.
    """
    for _ in range(3):
        call()
    synchronize()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < repeats and (len(times) < least or time.perf_counter() - began < seconds):
        start = time.perf_counter()
        call()
        synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return spread(times)


def wall_time(call: Call, repeats: int = 50) -> float:
    """Return the median of :func:`wall_times`."""
    return wall_times(call, repeats).median


def synchronize() -> None:
    """Wait until the GPU has done what was launched; nothing to wait for on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Give back the memory that earlier benchmarks held, so that it counts nowhere."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def peak_memory(
    call: Call, *, total: bool = False, calls: int = 1, warm: bool = True
) -> float | None:
    """Measure the MiB that one call needs on the GPU at most; ``None`` without a GPU.

    Args:
        call: what is measured.
        total: count what was there before (weights, inputs), too.
        calls: this many instead of one. What a graph needs shows while it is captured: replays
            take nothing new.
        warm: call once before, which may need more (libraries load, kernels compile).
    """
    if not torch.cuda.is_available():
        return None
    if warm:
        call()
    torch.cuda.synchronize()
    before = 0 if total else torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Return ‖value − truth‖ / ‖truth‖."""
    return float((value.to(truth.dtype) - truth).norm() / truth.norm().clamp_min(1e-300))


def input_sets(bytes_per_set: int, most: int = 8) -> int:
    """Return how many sets of inputs fill four L2 caches, 2 to ``most``; 2 without a GPU."""
    if not torch.cuda.is_available():
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(most, ceil_div(4 * cache, max(1, bytes_per_set))))


@functools.cache
def ceilings() -> dict[str, float]:
    """Measure, once, what this machine reaches: ``flops`` and ``bytes`` per second.

    Bytes count reading and writing of a large copy; the matrix product is square and in
    :func:`dtype`, the better of two sizes.
    """
    where = device()
    large = where.type == "cuda"
    count = 2**28 if large else 2**25
    source, target = torch.rand(count, device=where), torch.empty(count, device=where)
    copied = _device_time(lambda: target.copy_(source))
    rates = []
    for n in (4096, 8192) if large else (512, 1024):
        a, b = (torch.randn(n, n, device=where).to(dtype()) for _ in range(2))
        rates.append(2 * n**3 / _device_time(functools.partial(torch.matmul, a, b)))
    return {"flops": max(rates) * 1e6, "bytes": 8 * count / copied * 1e6}


def _device_time(call: Call) -> float:
    """Return the median in µs, on a GPU without the launch."""
    times = graph_times([call]) if torch.cuda.is_available() else wall_times(call, 20)
    return times.median


def floor(flops: float, moved: float) -> float:
    """Return the larger of the times for FLOPs and for bytes at :func:`ceilings`, in µs."""
    limit = ceilings()
    return max(flops / limit["flops"], moved / limit["bytes"]) * 1e6


def four_digits(value: float) -> float:
    """Round to four significant digits, so that a slow or busy machine's rate is no 0."""
    return float(f"{value:.4g}")


def environment(command: str) -> Environment:
    """Return commit, machine and versions, without which a result means nothing.

    :func:`ceilings` are measured first, so that the clocks are those of a busy GPU.
    """
    limit = ceilings()
    cuda = torch.cuda.is_available()
    if cuda:
        machine: dict[str, object] = {"cuda": torch.version.cuda, **_gpu_state()}
    else:
        machine = {"threads": torch.get_num_threads()}
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        commit=git_commit(),
        gpu=torch.cuda.get_device_name() if cuda else None,
        dtype=str(dtype()).removeprefix("torch."),
        copy_rate=four_digits(limit["bytes"] / 1e12),
        product_rate=four_digits(limit["flops"] / 1e12),
        versions=versions(),
        machine=machine,
    )


def _gpu_state() -> dict[str, str]:
    """Return driver and clocks as the driver's own tool tells them; nothing where it is missing."""
    keys = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"]
    values = _output(command)
    return dict(zip(keys, values.split(", "), strict=False)) if values else {}


def git_commit() -> str | None:
    """Return the commit of the sources, ``-dirty`` where the working tree holds changes."""
    if "FASTADAPT_COMMIT" in os.environ:  # a copy without its repository
        return os.environ["FASTADAPT_COMMIT"]
    folder = str(Path(__file__).parent)
    return _output(["git", "-C", folder, "describe", "--always", "--dirty", "--exclude=*"])


def _output(command: list[str]) -> str | None:
    """Return what a command prints; ``None`` if it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
