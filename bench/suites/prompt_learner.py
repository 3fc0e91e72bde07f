"""GDPL's prompt learner: the quaternion networks of all layers, from domain features to prompts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.gdpl.prompts import DomainPromptLearner
from fastadapt.kernels import quaternion_matrix

from .. import harness
from ..operation import Case, Provider, measure, with_backend

TITLE = "GDPL prompt learner: prompts of 2, depth 9, widths 512 and 768"
NOTES = (
    "Domain features [B, 512] to the prompts of all layers. Upstream's formulation pads inputs "
    "with zeros and runs one network after the other. All providers share the weights, which stay "
    "in the L2 cache."
)
BATCHES = (4, 32)
FEATURES, TEXT, VISION, TOKENS, DEPTH = 512, 512, 768, 2, 9


def quaternion(layer: nn.Module, index: int | None, x: Tensor) -> Tensor:
    """A quaternion layer as upstream computes it: zeros in front of ``x``, a matrix built first.

    Args:
        index: of the network, where the layer holds several.
    """
    weights = [getattr(layer, f"{name}_weight") for name in "rijk"]
    bias = layer.bias
    if index is not None:
        weights, bias = [w[index] for w in weights], bias[index]
    return torch.cat([torch.zeros_like(x), x], dim=-1) @ quaternion_matrix(*weights) + bias


def upstream_prompts(
    learner: DomainPromptLearner, features: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Prompts of the first text layer, the first vision layer and the deeper vision layers."""
    bias = learner.meta_net(features)[:, None]
    text = quaternion(learner.language_net, None, learner.ctx + bias)
    deep = [
        quaternion(learner.vision_nets, index, prompt + bias)
        for index, prompt in enumerate(learner.deep_ctx)
    ]
    return text, learner.proj(learner.ctx), deep


def case(batch: int) -> Case:
    """One batch with all that can run it here."""
    torch.manual_seed(0)
    learner = DomainPromptLearner(FEATURES, TEXT, VISION, n_ctx=TOKENS, depth=DEPTH)
    learner = learner.to(harness.device(), harness.dtype()).eval()
    exact = copy.deepcopy(learner).double()
    weights = list(learner.parameters())

    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator(harness.device()).manual_seed(seed)
        x = torch.randn(batch, FEATURES, generator=generator, device=harness.device())
        return [x.to(harness.dtype()).requires_grad_()]

    def prompts(module):
        def call(features):
            made = module(features)
            return made.text, made.vision, made.deep_vision

        return call

    def upstream(features):
        text, vision, deep = upstream_prompts(learner, features)
        return text, vision[None], torch.stack(deep)

    calls = {
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
    """FLOPs without the products with zeros, and bytes at least: the weights, and prompts out."""
    rows, size = batch * TOKENS, harness.dtype().itemsize
    # Half of a quaternion network's input is zeros, so it does the work of a dense layer on TEXT.
    flops = 2 * rows * TEXT * (TEXT + (DEPTH - 1) * VISION)
    moved = size * (weights + rows * (TEXT + (DEPTH - 1) * VISION))
    return {"forward": (flops, moved), "backward": (2 * flops, 2 * moved)}


def _names(module: nn.Module) -> list[str]:
    return [f"d{name}" for name, _ in module.named_parameters()]


def run(quick: bool = False) -> Iterator[dict[str, Any]]:
    """Times every batch; see :func:`fastadapt.bench.run`."""
    for batch in BATCHES[:1] if quick else BATCHES:
        yield measure(case(batch))
