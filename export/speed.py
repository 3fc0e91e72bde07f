"""Images per second: how they are measured, and how they are written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .runtimes import Runtime

# A smaller speed-up is noise, and not worth another file.
LEAST_SPEEDUP = 1.05

SECONDS = 0.5  # that a speed is measured for, where nothing else is said


def throughput(call: Callable[[], Any], batch: int, seconds: float | None = None) -> float:
    """Measure images per second of a function, from the median of its calls.

    Args:
        call: handles one batch; called once before measuring, as warm-up.
        batch: images per call.
        seconds: time to measure for, ``SECONDS`` if ``None``; at least three calls are made.
    """
    seconds = SECONDS if seconds is None else seconds
    call()
    times: list[float] = []
    begin = start = time.perf_counter()
    while start < begin + seconds or len(times) < 3:
        call()
        end = time.perf_counter()
        times.append(end - start)
        start = end
    return batch / float(np.median(times))


def speeds_in_turns(runtimes: Sequence[Runtime], *example: np.ndarray) -> list[float]:
    """Measure runtimes in turns, so that a busy machine is so for each; return the best of each.

    Inputs and outputs stay in the memory of the runtime's device.

    Args:
        runtimes: that take the same inputs.
        example: their inputs, one batch.
    """

    def once(runtime: Runtime) -> float:
        given = [torch.from_numpy(x).to(runtime.device) for x in example]

        def call() -> None:
            runtime(*given)
            if runtime.device == "cuda":
                torch.cuda.synchronize()

        return throughput(call, len(example[0]), 0.5)

    rounds = [list(map(once, runtimes)) for _ in range(3)]
    return [max(speeds) for speeds in zip(*rounds, strict=True)]


def format_rate(per_second: float) -> str:
    """Format a rate to three digits: ``0.52``, ``20.5``, ``991``, ``14,700``."""
    return f"{float(f'{per_second:.3g}'):,g}"
