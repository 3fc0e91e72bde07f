"""Time cluster attention: our kernels, the best formulation in PyTorch, and upstream's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastadapt.kernels import cluster_attention, cluster_attention_reference

from .. import harness, upstream
from ..operation import Case, Provider, measure
from ..protocol import Benchmark, Record

TITLE = "Cluster attention, channel mode, 20 centers, rank 256"
NOTES = (
    "B × N × C are batch, tokens and channels. Eager and compiled are the best formulation in "
    "PyTorch, without upstream's [B, K, R, R]."
)
# Batch, tokens, channels; first target and ambition, forward and backward, in µs on an H100.
SHAPES = {
    (128, 196, 768): {"forward": (70, 58), "backward": (165, 140)},
    (64, 256, 1024): {"forward": (54, 47), "backward": (130, 110)},
    (32, 196, 768): {"forward": (33, 25)},
    (256, 49, 1280): {"forward": (80, 65)},
    (1, 196, 768): {"forward": (16, 10)},
}
QUICK = ((128, 196, 768), (1, 196, 768))
CPU = ((1, 196, 768), (4, 196, 768), (4, 49, 1280))
CENTERS, RANK = 20, 256
NAMES = ("y", "dx", "dcenters", "dtransforms", "ddown", "ddown_bias", "dup", "dup_bias")


def shapes(quick: bool) -> tuple[tuple[int, int, int], ...]:
    """Return the batches, tokens and channels that are timed on this machine."""
    if not torch.cuda.is_available():
        return CPU[:1] if quick else CPU
    return QUICK if quick else tuple(SHAPES)


def make_inputs(batch: int, tokens: int, width: int, seed: int = 0) -> list[Tensor]:
    """Return arguments of ``cluster_attention`` that require gradients."""
    where = harness.device()
    generator = torch.Generator(where).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=where) * scale
        return values.to(harness.dtype()).requires_grad_()

    return [
        normal(batch, tokens, width),
        normal(width, CENTERS),
        normal(CENTERS, RANK, RANK),
        normal(RANK, width, scale=width**-0.5),
        normal(RANK),
        normal(width, RANK, scale=RANK**-0.5),
        normal(width),
    ]


def work(batch: int, tokens: int, width: int) -> dict[str, tuple[float, float]]:
    """Return FLOPs and the least bytes: tokens in once and out once; all else is small."""
    rows = batch * tokens
    project, mix = 2 * rows * width * RANK, 2 * rows * RANK * RANK
    moved = harness.dtype().itemsize * rows * width
    return {
        "forward": (2 * project + mix, 2 * moved),
        "backward": (4 * project + 3 * mix, 4 * moved),
    }


def case(batch: int, tokens: int, width: int) -> Case:
    """Return one shape with all providers that run on this machine."""
    reference = Provider(cluster_attention_reference)
    providers = {
        "ours": Provider(cluster_attention),
        "eager": reference,
        "upstream": Provider(upstream.cluster_attention),
    }
    if torch.cuda.is_available():
        providers["ours"] = Provider(partial(cluster_attention, backend="triton"))
        providers["compiled"] = Provider(torch.compile(cluster_attention_reference, dynamic=False))
    return Case(
        shape=f"{batch} × {tokens} × {width}",
        dimensions="batch × tokens × channels",
        size=batch * tokens * width,
        inputs=partial(make_inputs, batch, tokens, width),
        providers=providers,
        exact=reference,
        work=work(batch, tokens, width),
        names=NAMES,
        targets=SHAPES.get((batch, tokens, width), {}),
    )


def run(quick: bool = False) -> Iterator[Record]:
    """Time every shape."""
    for shape in shapes(quick):
        yield measure(case(*shape))


BENCHMARK = Benchmark(TITLE, NOTES, run)
