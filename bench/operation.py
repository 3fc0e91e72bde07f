"""One operation at one shape: checked, then timed in every formulation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import harness

ERROR_BUDGET = 2  # ours may be off by so many times PyTorch's own error in the same dtype
SLACK = 1e-7  # beside that, for values that PyTorch happens to hit exactly
BOTH = "forward + backward"


@dataclass(frozen=True)
class Provider:
    """One formulation of an operation.

    Attributes:
        call: a case's inputs to one tensor or several.
        weights: of a module; their gradients are wanted beside those of the inputs.
        inputs: of a seed, where they are not the case's: of a dense layer beside a quaternion
            layer, say, which computes something else and is not checked.
    """

    call: Callable[..., Tensor | Sequence[Tensor]]
    weights: Sequence[Tensor] = ()
    inputs: Callable[[int], list[Tensor]] | None = None


@dataclass(frozen=True)
class Case:
    """One shape of an operation.

    Attributes:
        shape: in words, for tables.
        dimensions: what the numbers in ``shape`` are.
        size: their product, for plots.
        inputs: of a seed; those that require gradients get some.
        providers: by name; ``ours`` and ``eager`` (the best formulation in PyTorch) among them.
        exact: the operation in fp64, on inputs in fp64.
        work: FLOPs and bytes at least, by part (``forward``, ``backward``).
        names: of the outputs, then of the gradients, for messages.
        targets: in µs on an H100, by part; the first to be met, the second the ambition.
        speedups: asked for, by part: a factor, and over which provider.
    """

    shape: str
    dimensions: str
    size: int
    inputs: Callable[[int], list[Tensor]]
    providers: dict[str, Provider]
    exact: Provider
    work: dict[str, tuple[float, float]]
    names: Sequence[str]
    targets: dict[str, Sequence[float]] = field(default_factory=dict)
    speedups: dict[str, tuple[float, str]] = field(default_factory=dict)


def with_backend(name: str, call: Callable) -> Callable:
    """``call`` under ``FASTADAPT_BACKEND=name``."""

    def chosen(*args):
        before = os.environ.get("FASTADAPT_BACKEND")
        os.environ["FASTADAPT_BACKEND"] = name
        try:
            return call(*args)
        finally:
            if before is None:
                del os.environ["FASTADAPT_BACKEND"]
            else:
                os.environ["FASTADAPT_BACKEND"] = before

    return chosen


def measure(case: Case) -> dict[str, Any]:
    """Checks a case and times its providers.

    Returns:
        A record for the results: ``shape``, ``dimensions``, ``size``, ``errors``, and ``parts``; or
        ``wrong`` instead, where our result is off by more than ``ERROR_BUDGET`` allows. By part,
        metric and provider, ``parts`` holds ``gpu_us`` (CUDA graphs, rotated inputs; the backward
        is the difference between both and forward), ``wall_us`` (eager calls) and ``peak_mib``
        (beyond inputs and weights), beside ``flops``, ``bytes`` and ``floor_us``. A provider other
        than ours that fails is named in ``failed``, with its error.
    """
    try:
        return _measure(case)
    finally:
        torch.compiler.reset()  # the next shape starts without a history of recompilations


def _measure(case: Case) -> dict[str, Any]:
    errors, failed = _errors(case)
    record: dict[str, Any] = {
        "shape": case.shape,
        "dimensions": case.dimensions,
        "size": case.size,
        "errors": errors,
        "failed": failed,
    }
    wrong = {
        name: values
        for name, values in errors.items()
        if not values["ours"] <= ERROR_BUDGET * values["eager"] + SLACK
    }
    if wrong:
        return record | {"wrong": wrong}
    parts: dict[str, dict[str, Any]] = {name: {} for name in ("forward", "backward", BOTH)}
    work = dict(case.work)
    work[BOTH] = tuple(sum(values) for values in zip(*work.values(), strict=True))
    for part, (flops, moved) in work.items():
        floor = {"flops": flops, "bytes": moved, "floor_us": harness.floor(flops, moved)}
        parts[part] |= floor
    if torch.cuda.is_available():
        for part, target in case.targets.items():
            parts[part]["target_us"] = list(target)
        for part, target in case.speedups.items():
            parts[part]["target_speedup"] = list(target)

    first = case.inputs(0)
    size = sum(t.numel() * t.element_size() for t in first)
    # Weights of a module are shared by all sets, so that no number of sets gets past the cache.
    sets = harness.input_sets(size, most=32 if case.providers["ours"].weights else 256)
    inputs = [first, *(case.inputs(seed) for seed in range(1, sets))]
    gradients = _gradients(case.providers["ours"].call(*first))
    for name, provider in case.providers.items():
        if name in failed or (name == "eager" and not torch.cuda.is_available()):
            continue  # without a GPU ours is the same code as eager
        try:
            make = provider.inputs
            own = inputs if make is None else [make(seed) for seed in range(sets)]
            found = _times(provider, own, gradients)
        except Exception as error:
            if name == "ours":
                raise
            failed[name] = _reason(error)
            continue
        for part, metrics in found.items():
            for metric, value in metrics.items():
                parts[part].setdefault(metric, {})[name] = value
    return record | {"parts": parts}


def _times(provider, inputs, gradients) -> dict[str, dict[str, Any]]:
    def forward(args):
        with torch.no_grad():
            return provider.call(*args)

    def both(args):
        return _results(provider, args, gradients)

    parts = {}
    for part, call, repeats in (("forward", forward, 4), (BOTH, both, 2)):
        parts[part] = {"wall_us": harness.wall_times(lambda call=call: call(inputs[0]), 20, 0.5)}
        memory = harness.peak_memory(lambda call=call: call(inputs[0]))
        if memory is None:
            continue
        parts[part]["peak_mib"] = memory
        # Enough calls for a graph of a useful length, no more: many sets are many already.
        repeats = max(1, repeats * 4 // len(inputs))
        calls = [lambda call=call, args=args: call(args) for args in inputs]
        parts[part]["gpu_us"] = harness.graph_times(calls, repeats)
    if "gpu_us" in parts[BOTH]:
        whole, part = parts[BOTH]["gpu_us"], parts["forward"]["gpu_us"]
        parts["backward"] = {"gpu_us": harness.difference(whole, part)}
    return parts


def _errors(case: Case) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Errors against fp64 by name and provider, and why a baseline has none."""
    inputs = case.inputs(0)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    outputs = _outputs(case.exact.call(*wide))
    gradients = _gradients([y.to(inputs[0].dtype) for y in outputs])
    truth = _results(case.exact, wide, [g.double() for g in gradients])
    errors: dict[str, dict[str, float]] = {name: {} for name in case.names}
    failed = {}
    for name, provider in case.providers.items():
        if provider.inputs is not None:
            continue
        try:
            found = _results(provider, inputs, gradients)
        except Exception as error:
            if name in ("ours", "eager"):
                raise
            failed[name] = _reason(error)
            continue
        for key, value, exact in zip(case.names, found, truth, strict=True):
            errors[key][name] = harness.relative_error(value, exact)
    return errors, failed


def _results(provider: Provider, inputs, gradients) -> list[Tensor]:
    """Outputs, then gradients of inputs and weights."""
    outputs = _outputs(provider.call(*inputs))
    leaves = [*(t for t in inputs if t.requires_grad), *provider.weights]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, gradients)]


def _outputs(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _gradients(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Incoming gradients, the same for all providers."""
    torch.manual_seed(1)
    return [torch.randn_like(y) for y in _outputs(value)]


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
