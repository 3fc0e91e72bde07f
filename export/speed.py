"""Images per second: how they are measured, and how they are written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

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


def format_rate(per_second: float) -> str:
    """Format a rate to three digits: ``0.52``, ``20.5``, ``991``, ``14,700``."""
    return f"{float(f'{per_second:.3g}'):,g}"
