"""Time quaternion linear layers: our kernels, the matrix built first, dense layers as wide."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.kernels import quaternion_linear, quaternion_linear_reference

from .. import harness, upstream
from ..operation import BOTH, Case, Provider, measure
from ..protocol import Benchmark, Record

TITLE = "Quaternion linear layer, Hamilton form, with bias"
NOTES = (
    "M × in × out are rows, inputs, outputs. Eager and compiled build the Hamilton matrix in the "
    "input's dtype and multiply; upstream does so in fp32, whatever the input is; dense is an "
    "nn.Linear of the same width (cuBLAS), with four times the weights. Asked for is at most 1.2 "
    "times the dense layer's time in both directions: 0.83×."
)
# Rows, inputs, outputs; first target and ambition, forward, in µs on an H100.
SHAPES = {
    (8, 1024, 512): (4.0, 3.5),
    (64, 1024, 768): (4.7, 4.2),
    (16, 4096, 4096): (8.9, 7.5),
    (64, 4096, 4096): (12, 9.5),
    (4096, 1024, 1024): (16, 15),
    (25088, 1024, 1024): (79, 77),
    (8192, 4096, 4096): (380, 300),
}
QUICK = ((8, 1024, 512), (4096, 1024, 1024))
CPU = ((8, 1024, 512), (64, 1024, 768), (16, 4096, 4096))
NAMES = ("y", "dx", "dr", "di", "dj", "dk", "dbias")


def shapes(quick: bool) -> tuple[tuple[int, int, int], ...]:
    """Return the rows, inputs and outputs that are timed on this machine."""
    if not torch.cuda.is_available():
        return CPU[:1] if quick else CPU
    return QUICK if quick else tuple(SHAPES)


def make_inputs(
    rows: int, width: int, height: int, seed: int = 0, dense: bool = False
) -> list[Tensor]:
    """Return arguments of ``quaternion_linear``, or of ``F.linear``, that require gradients."""
    where = harness.device()
    generator = torch.Generator(where).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=where) * scale
        return values.to(harness.dtype()).requires_grad_()

    x, bias, scale = normal(rows, width), normal(height), width**-0.5
    if dense:
        return [x, normal(height, width, scale=scale), bias]
    return [x, *(normal(width // 4, height // 4, scale=scale) for _ in range(4)), bias]


def work(rows: int, width: int, height: int) -> dict[str, tuple[float, float]]:
    """Return the dense product's FLOPs, and the least bytes: in, out, a quarter of its weights."""
    flops, weights = 2 * rows * width * height, width * height // 4
    size = harness.dtype().itemsize
    return {
        "forward": (flops, size * (rows * (width + height) + weights)),
        "backward": (2 * flops, size * (rows * (2 * width + height) + 2 * weights)),
    }


def case(rows: int, width: int, height: int) -> Case:
    """Return one shape with all providers that run on this machine."""
    shape = rows, width, height
    reference = Provider(quaternion_linear_reference)
    providers = {
        "ours": Provider(quaternion_linear),
        "eager": reference,
        "upstream": Provider(upstream.quaternion_linear),
        "dense": Provider(F.linear, inputs=partial(make_inputs, *shape, dense=True)),
    }
    if torch.cuda.is_available():
        providers["ours"] = Provider(partial(quaternion_linear, backend="triton"))
        providers["compiled"] = Provider(torch.compile(quaternion_linear_reference, dynamic=False))
    return Case(
        shape=" × ".join(map(str, shape)),
        dimensions="M × in × out",
        size=rows * width * height,
        inputs=partial(make_inputs, *shape),
        providers=providers,
        exact=reference,
        work=work(*shape),
        names=NAMES,
        targets={"forward": SHAPES[shape]} if shape in SHAPES else {},
        speedups={BOTH: (0.83, "dense")},
    )


def run(quick: bool = False) -> Iterator[Record]:
    """Time every shape."""
    for shape in shapes(quick):
        yield measure(case(*shape))


BENCHMARK = Benchmark(TITLE, NOTES, run)
