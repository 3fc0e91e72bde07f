"""Whole steps of a network: checked against fp32, timed as calls, weighed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.cuda_graph import WARMUP

from . import harness
from .operation import ERROR_BUDGET


def outputs(
    logits: Callable[[], Tensor], labels: Tensor, trained: Iterable[Tensor]
) -> dict[str, Tensor]:
    """The logits, and the loss's gradient of all trained weights as one vector; fp32 or fp64."""
    y = logits().float() if harness.dtype() != torch.float32 else logits()
    gradients = torch.autograd.grad(F.cross_entropy(y, labels), list(trained))
    flat = torch.cat([g.flatten().to(y.dtype) for g in gradients])
    return {"logits": y.detach(), "gradient": flat}


def check(
    ours: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Errors of :func:`outputs` against the truth.

    Args:
        ours: in reduced precision.
        plain: upstream's formulation in that precision.
        truth: upstream's formulation in a higher precision.

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
    """Why a step was not captured, for one: then its figures are not what they are taken for."""
    print(line, file=sys.stderr, flush=True)


def measure(
    call: Callable[[], object], seconds: float = 1.0, graph: bool = False
) -> dict[str, Any]:
    """Wall time and peak memory of a step, weights and inputs included.

    Args:
        call: takes the step, or infers. With ``graph``, it was not called before.
        seconds: as for :func:`fastadapt.bench.harness.wall_times`.
        graph: whether its first calls capture a CUDA graph
            (:class:`fastadapt.GraphedStep`, :class:`fastadapt.GraphedCall`); replays are timed.

    Returns:
        ``wall_us`` and ``peak_mib`` (with a GPU); or ``failed``, why there is neither.
    """
    try:
        # Of a graph: the calls that lead to its capture, and a replay.
        calls = WARMUP + 1 if graph else 1
        memory = harness.peak_memory(call, total=True, calls=calls, warm=not graph)
        found = {"wall_us": harness.wall_times(call, 20, seconds)}
    except torch.OutOfMemoryError:
        found, memory = {"failed": "out of memory"}, None
    harness.release()
    return found if memory is None else found | {"peak_mib": memory}


def part(found: dict[str, dict[str, Any]], **targets: Sequence) -> dict[str, Any]:
    """A part of a record from what :func:`measure` gave for each provider."""
    result: dict[str, Any] = dict(targets)
    for name, metrics in found.items():
        for metric, value in metrics.items():
            result.setdefault(metric, {})[name] = value
    return result
