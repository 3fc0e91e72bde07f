"""Images per second: how they are measured, and how they are written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def throughput(call: Callable[[], Any], batch: int, seconds: float = 1.0) -> float:
    """Measure images per second of a function, from the median of its calls.

    Args:
        call: handles one batch; called once before measuring, as warm-up.
        batch: images per call.
        seconds: time to measure for; at least three calls are made.
    """
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
