"""Time one CLAdapter block, LayerNorm to residual, beside the same block compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastadapt.kernels import cluster_attention_reference
from fastadapt.layers.cladapter import CLAdapterBlock

from .. import harness
from ..operation import BOTH, Case, Provider, measure, with_backend
from ..protocol import Benchmark, Record
from ..upstream import cladapter_block
from . import cluster_attention as attention

TITLE = "CLAdapter block: LayerNorms, cluster attention, MLP of ratio 4, residual"
NOTES = (
    "All providers share the block's weights; only the tokens are rotated. Eager and compiled have "
    "the best formulation of cluster attention in PyTorch; “ours, compiled” is torch.compile over "
    "the block with our kernels in it."
)
MLP_RATIO = 4


def case(batch: int, tokens: int, width: int) -> Case:
    """Return one shape with all providers that run on this machine."""
    torch.manual_seed(0)
    block = CLAdapterBlock(
        width, mlp_ratio=MLP_RATIO, num_centers=attention.CENTERS, rank=attention.RANK
    )
    block = block.to(harness.device(), harness.dtype())
    exact = copy.deepcopy(block).double()
    weights = list(block.parameters())

    def inputs(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator(harness.device()).manual_seed(seed)
        shape = (batch, tokens, width)
        x = torch.randn(shape, generator=generator, device=harness.device())
        return [x.to(harness.dtype()).requires_grad_()]

    main = (batch, tokens, width) == next(iter(attention.SHAPES))
    calls: dict[str, Callable[..., Any]] = {
        "ours": block,
        "eager": cladapter_block(block, cluster_attention_reference),
        "upstream": cladapter_block(block),
    }
    if torch.cuda.is_available():
        calls["ours"] = with_backend("triton", block)
        calls["compiled"] = torch.compile(calls["eager"], dynamic=False)
        if main:  # compiling takes time
            ours = torch.compile(block, dynamic=False)
            calls["ours, compiled"] = with_backend("triton", ours)
    speedups = {"forward": 1.25, BOTH: 1.2} if main else {"forward": 1, BOTH: 1}
    return Case(
        shape=f"{batch} × {tokens} × {width}",
        dimensions="batch × tokens × channels",
        size=batch * tokens * width,
        inputs=inputs,
        providers={name: Provider(call, weights) for name, call in calls.items()},
        exact=Provider(
            cladapter_block(exact, cluster_attention_reference), list(exact.parameters())
        ),
        work=work(batch, tokens, width),
        names=("y", "dx", *(f"d{name}" for name, _ in block.named_parameters())),
        speedups={part: (factor, "compiled") for part, factor in speedups.items()},
    )


def work(batch: int, tokens: int, width: int) -> dict[str, tuple[float, float]]:
    """Return FLOPs and the least bytes: tokens in and out, the MLP's weights once."""
    rows, size = batch * tokens, harness.dtype().itemsize
    part = attention.work(batch, tokens, width)
    weights = 2 * MLP_RATIO * width**2
    forward, backward = part["forward"], part["backward"]
    return {
        "forward": (forward[0] + 2 * rows * weights, 2 * size * rows * width + size * weights),
        "backward": (
            backward[0] + 4 * rows * weights,
            3 * size * rows * width + 2 * size * weights,
        ),
    }


def run(quick: bool = False) -> Iterator[Record]:
    """Time every shape."""
    for shape in attention.shapes(quick):
        yield measure(case(*shape))


BENCHMARK = Benchmark(TITLE, NOTES, run)
