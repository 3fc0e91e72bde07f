"""Check whole steps of a network against higher precision; measure their time and memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.cuda_graph import WARMUP

from . import harness
from .operation import ERROR_BUDGET
from .protocol import Errors, Part, Spread


@dataclass
class Step:
    """What a step took: wall time and, on a GPU, peak memory; or why there is neither."""

    wall_us: Spread | None = None
    peak_mib: float | None = None
    failed: str | None = None


def outputs(
    logits: Callable[[], Tensor], labels: Tensor, trained: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Return the logits, and the gradient of all trained weights as one vector; fp32 or fp64."""
    y = logits().float() if harness.dtype() != torch.float32 else logits()
    gradients = torch.autograd.grad(F.cross_entropy(y, labels), list(trained))
    flat = torch.cat([g.flatten().to(y.dtype) for g in gradients])
    return {"logits": y.detach(), "gradient": flat}


def check(
    ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> tuple[Errors, Errors]:
    """Compare :func:`outputs` of both sides with the truth.

    Args:
        ours: what ours gives in reduced precision.
        plain: what upstream's formulation gives in that precision.
        truth: what upstream's formulation gives in a higher precision.

    Returns:
        Errors by name and provider, and those of them that are too large.
    """
    errors = {
        name: {
            "ours": harness.relative_error(ours[name], exact),
            "upstream": harness.relative_error(plain[name], exact),
        }
        for name, exact in truth.items()
    }
    # In full precision on a CPU both are at rounding, where sums in another order decide.
    slack = 1e-5 if harness.dtype() == torch.float32 else 0.0
    wrong = {
        name: values
        for name, values in errors.items()
        if not values["ours"] <= ERROR_BUDGET * values["upstream"] + slack
    }
    return errors, wrong


def say(line: str) -> None:
    """Print to stderr, for example why a step was not captured, which its figures depend on."""
    print(line, file=sys.stderr, flush=True)


def measure(call: Callable[[], object], seconds: float = 1.0, graph: bool = False) -> Step:
    """Measure wall time and peak memory of a step, weights and inputs included.

    Args:
        call: takes the step, or infers. With ``graph``, it was not called before.
        seconds: see :func:`fastadapt.bench.harness.wall_times`.
        graph: whether its first calls capture a CUDA graph
            (:class:`fastadapt.GraphedStep`, :class:`fastadapt.GraphedCall`); replays are timed.
    """
    step = Step()
    try:
        # Of a graph: the calls that lead to its capture, and a replay.
        calls = WARMUP + 1 if graph else 1
        memory = harness.peak_memory(call, total=True, calls=calls, warm=not graph)
        step = Step(harness.wall_times(call, 20, seconds), memory)
    except torch.OutOfMemoryError:
        step = Step(failed="out of memory")
    harness.release()
    return step


def part(found: dict[str, Step]) -> Part:
    """Return a part of a record from the steps of each provider."""
    result = Part()
    for name, step in found.items():
        if step.wall_us is not None:
            result.wall_us[name] = step.wall_us
        if step.peak_mib is not None:
            result.peak_mib[name] = step.peak_mib
        if step.failed is not None:
            result.failed[name] = step.failed
    return result
