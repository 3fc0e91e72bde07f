"""Time GDPL's prompt learner: quaternion networks from domain features to prompts of all layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.gdpl.prompts import DomainPromptLearner

from .. import harness
from .. import upstream as theirs
from ..operation import Case, Provider, measure, with_backend
from ..protocol import Benchmark, Record

TITLE = "GDPL prompt learner: prompts of 2, depth 9, widths 512 and 768"
NOTES = (
    "Domain features [B, 512] to the prompts of all layers. Upstream's formulation pads inputs "
    "with zeros and runs one network after the other. All providers share the weights, which stay "
    "in the L2 cache."
)
BATCHES = (4, 32)
FEATURES, TEXT, VISION, TOKENS, DEPTH = 512, 512, 768, 2, 9


def case(batch: int) -> Case:
    """Return one batch with all providers that run on this machine."""
    torch.manual_seed(0)
    learner = DomainPromptLearner(FEATURES, TEXT, VISION, n_ctx=TOKENS, depth=DEPTH)
    learner = learner.to(harness.device(), harness.dtype()).eval()
    exact = copy.deepcopy(learner).double()
    weights = list(learner.parameters())

    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator(harness.device()).manual_seed(seed)
        x = torch.randn(batch, FEATURES, generator=generator, device=harness.device())
        return [x.to(harness.dtype()).requires_grad_()]

    def prompts(module: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def call(features: Tensor) -> tuple[Tensor, ...]:
            made = module(features)
            return made.text, made.vision, made.deep_vision

        return call

    def upstream(features: Tensor) -> tuple[Tensor, ...]:
        text, vision, deep = theirs.prompts(learner, features)
        return text, vision[None], torch.stack(deep)

    calls: dict[str, Callable[..., Any]] = {
        "ours": prompts(learner),
        "eager": with_backend("reference", prompts(learner)),
        "upstream": upstream,
    }
    if torch.cuda.is_available():
        compiled = torch.compile(prompts(learner), dynamic=False)
        calls["compiled"] = with_backend("reference", compiled)
    return Case(
        shape=str(batch),
        dimensions="batch",
        size=batch,
        inputs=inputs,
        providers={name: Provider(call, weights) for name, call in calls.items()},
        exact=Provider(with_backend("reference", prompts(exact)), list(exact.parameters())),
        work=work(batch, sum(w.numel() for w in weights)),
        names=("text", "vision", "deep_vision", "dfeatures", *_names(learner)),
    )


def work(batch: int, weights: int) -> dict[str, tuple[float, float]]:
    """Return FLOPs without products with zeros, and the least bytes: weights, and prompts out."""
    rows, size = batch * TOKENS, harness.dtype().itemsize
    # Half of a quaternion network's input is zeros, so it does the work of a dense layer on TEXT.
    flops = 2 * rows * TEXT * (TEXT + (DEPTH - 1) * VISION)
    moved = size * (weights + rows * (TEXT + (DEPTH - 1) * VISION))
    return {"forward": (flops, moved), "backward": (2 * flops, 2 * moved)}


def _names(module: nn.Module) -> list[str]:
    return [f"d{name}" for name, _ in module.named_parameters()]


def run(quick: bool = False) -> Iterator[Record]:
    """Time every batch."""
    for batch in BATCHES[:1] if quick else BATCHES:
        yield measure(case(batch))


BENCHMARK = Benchmark(TITLE, NOTES, run)
