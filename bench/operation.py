"""Check one operation at one shape, then time it in every formulation."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import harness
from .protocol import Errors, Part, Record, Spread

ERROR_BUDGET = 2  # ours may be off by so many times PyTorch's own error in the same dtype
SLACK = 1e-7  # beside that, for values that PyTorch happens to hit exactly
BOTH = "forward + backward"


@dataclass(frozen=True)
class Provider:
    """One formulation of an operation.

    Attributes:
        call: maps a case's inputs to one tensor or several.
        weights: the weights of a module; their gradients are wanted beside those of the inputs.
        inputs: makes inputs from a seed, where they are not the case's: those of a dense layer
            beside a quaternion layer, say, which computes something else and is not checked.
    """

    call: Callable[..., Tensor | Sequence[Tensor]]
    weights: Sequence[Tensor] = ()
    inputs: Callable[[int], list[Tensor]] | None = None


@dataclass(frozen=True)
class Case:
    """One shape of an operation.

    Attributes:
        shape: the shape, as tables show it.
        dimensions: what the numbers in ``shape`` are.
        size: their product, for plots.
        inputs: makes inputs from a seed; those that require gradients get some.
        providers: by name; ``ours`` and ``eager`` (the best formulation in PyTorch) among them.
        exact: the operation in fp64, on inputs in fp64.
        work: the least FLOPs and bytes, by part (``forward``, ``backward``).
        names: names of the outputs, then of the gradients, for messages.
        targets: by part, in µs on an H100; the first must be met, the second is the ambition.
        speedups: by part, the factor that is asked for, and over which provider.
    """

    shape: str
    dimensions: str
    size: int
    inputs: Callable[[int], list[Tensor]]
    providers: dict[str, Provider]
    exact: Provider
    work: dict[str, tuple[float, float]]
    names: Sequence[str]
    targets: Mapping[str, Sequence[float]] = field(default_factory=dict)
    speedups: dict[str, tuple[float, str]] = field(default_factory=dict)


def with_backend(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call`` run under ``FASTADAPT_BACKEND=name``."""

    def chosen(*args: Any) -> Any:
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


def measure(case: Case) -> Record:
    """Check a case and time its providers.

    Returns:
        The case's record: with figures by part; or with ``wrong`` instead, where our result is off
        by more than ``ERROR_BUDGET`` allows. GPU times are those of CUDA graphs over rotated
        inputs, the backward's the difference between both directions and the forward; wall times
        those of eager calls; peak memory is counted beyond inputs and weights. A provider other
        than ours that fails is named in ``failed``, with its error.
    """
    try:
        return _measure(case)
    finally:
        torch.compiler.reset()  # the next shape starts without a history of recompilations


def _measure(case: Case) -> Record:
    errors, failed = _errors(case)
    record = Record(case.shape, case.dimensions, case.size, errors, failed)
    record.wrong = {
        name: values
        for name, values in errors.items()
        if not values["ours"] <= ERROR_BUDGET * values["eager"] + SLACK
    }
    if record.wrong:
        return record
    record.parts = _empty_parts(case)

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
            times = _times(provider, own, gradients)
        except Exception as error:
            if name == "ours":
                raise
            failed[name] = _reason(error)
            continue
        for part_name, found in times.items():
            part = record.parts[part_name]
            if found.wall is not None:
                part.wall_us[name] = found.wall
            if found.gpu is not None:
                part.gpu_us[name] = found.gpu
            if found.memory is not None:
                part.peak_mib[name] = found.memory
    return record


def _empty_parts(case: Case) -> dict[str, Part]:
    """Return forward, backward and both with their least work, floors and targets."""
    work = dict(case.work)
    flops, moved = zip(*case.work.values(), strict=True)
    work[BOTH] = sum(flops), sum(moved)
    parts = {}
    for name in ("forward", "backward", BOTH):
        if name in work:
            parts[name] = Part(*work[name], floor_us=harness.floor(*work[name]))
        else:
            parts[name] = Part()
        if torch.cuda.is_available():
            parts[name].target_us = tuple(case.targets.get(name, ()))
            parts[name].target_speedup = case.speedups.get(name)
    return parts


@dataclass
class _Figures:
    """What one provider took for one part."""

    gpu: Spread | None = None
    wall: Spread | None = None
    memory: float | None = None


def _times(
    provider: Provider, inputs: list[list[Tensor]], gradients: list[Tensor]
) -> dict[str, _Figures]:
    def forward(args: list[Tensor]) -> object:
        with torch.no_grad():
            return provider.call(*args)

    def both(args: list[Tensor]) -> object:
        return _results(provider, args, gradients)

    found = {"forward": _part_times(forward, inputs, 4), BOTH: _part_times(both, inputs, 2)}
    whole, part = found[BOTH].gpu, found["forward"].gpu
    if whole is not None and part is not None:
        found["backward"] = _Figures(gpu=harness.difference(whole, part))
    return found


def _part_times(
    call: Callable[[list[Tensor]], object], inputs: list[list[Tensor]], repeats: int
) -> _Figures:
    figures = _Figures(wall=harness.wall_times(lambda: call(inputs[0]), 20, 0.5))
    figures.memory = harness.peak_memory(lambda: call(inputs[0]))
    if figures.memory is not None:
        # Enough calls for a graph of a useful length, no more: many sets are many already.
        repeats = max(1, repeats * 4 // len(inputs))
        figures.gpu = harness.graph_times([partial(call, args) for args in inputs], repeats)
    return figures


def _errors(case: Case) -> tuple[Errors, dict[str, str]]:
    """Return errors against fp64 by name and provider, and why a baseline has none."""
    inputs = case.inputs(0)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    outputs = _outputs(case.exact.call(*wide))
    gradients = _gradients([y.to(inputs[0].dtype) for y in outputs])
    truth = _results(case.exact, wide, [g.double() for g in gradients])
    errors: Errors = {name: {} for name in case.names}
    failed: dict[str, str] = {}
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


def _results(
    provider: Provider, inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> list[Tensor]:
    """Return outputs, then gradients of inputs and weights."""
    outputs = _outputs(provider.call(*inputs))
    leaves = [*(t for t in inputs if t.requires_grad), *provider.weights]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, gradients)]


def _outputs(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _gradients(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return incoming gradients, the same for all providers."""
    torch.manual_seed(1)
    return [torch.randn_like(y) for y in _outputs(value)]


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
