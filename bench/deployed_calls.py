"""Time calls of models that take uint8 images: images per second, and latency of single ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import harness

SIZE, LATENCY_CALLS = 224, 300

Call = Callable[[Tensor], Any]  # to a tensor, or to an array of a runtime


def make_images(count: int, seed: int = 1) -> Tensor:
    """Make uint8 images [count, SIZE, SIZE, 3], smooth, of different colours and contrasts."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 7, 7, generator=generator)
    small = small * torch.rand(count, 1, 1, 1, generator=generator)
    images = nn.functional.interpolate(small, (SIZE, SIZE), mode="bilinear")
    return (images * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def images_per_second(call: Call, batch: int, seconds: float = 0.6) -> float:
    """Measure calls one after the other, waited for at the end; the median of several rounds."""
    x = make_images(batch).to(harness.device())
    calls = 1
    while _seconds(call, x, calls) < seconds / 6:
        calls *= 2
    return batch * calls / statistics.median(_seconds(call, x, calls) for _ in range(5))


def _seconds(call: Call, x: Tensor, calls: int) -> float:
    harness.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call(x)
    harness.synchronize()
    return time.perf_counter() - start


def latency(call: Call) -> dict[str, str]:
    """Measure p50 and p99 of single calls at batch 1, from the call to the result on the GPU."""
    x = make_images(1).to(harness.device())
    for _ in range(20):
        call(x)
    times = [_seconds(call, x, 1) * 1e3 for _ in range(LATENCY_CALLS)]
    return {f"p{n}, ms": f"{np.percentile(times, n):.3f}" for n in (50, 99)}
