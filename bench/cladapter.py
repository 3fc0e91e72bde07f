"""One CLAdapter block, LayerNorm to residual, against the same block compiled."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

from fastadapt.bench import harness
from fastadapt.bench.cluster_attention import CENTERS, DTYPE, RANK, SHAPES
from fastadapt.layers.cladapter import CLAdapterBlock


@contextmanager
def _backend(name: str):
    before = os.environ.get("FASTADAPT_BACKEND")
    os.environ["FASTADAPT_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTADAPT_BACKEND"]
        else:
            os.environ["FASTADAPT_BACKEND"] = before


def run(quick: bool = False) -> dict:
    """Times every shape; see :func:`fastadapt.bench.run`."""
    rows = []
    for batch, tokens, width in SHAPES:
        if quick and batch not in (1, 128):
            continue
        torch.manual_seed(0)
        block = CLAdapterBlock(width, mlp_ratio=4.0, num_centers=CENTERS, rank=RANK)
        block = block.to("cuda", DTYPE)
        times = {}
        torch.compiler.reset()
        with _backend("reference"):
            times["compiled"] = _times(torch.compile(block, dynamic=False), batch, tokens, width)
        with _backend("triton"):
            times["ours"] = _times(block, batch, tokens, width)
        row = {"B × N × C": f"{batch} × {tokens} × {width}"}
        for i, part in enumerate(("forward", "forward + backward")):
            for provider in ("ours", "compiled"):
                row[f"{provider}, {part}"] = f"{times[provider][i]:.0f}"
            row[f"speedup, {part}"] = f"{times['compiled'][i] / times['ours'][i]:.2f}×"
        rows.append(row)
    title = "a block, depth 1, mlp_ratio 4, bf16, GPU µs (CUDA graph)"
    return {"tables": {title: rows}}


def _times(block, batch, tokens, width) -> tuple[float, float]:
    sets = harness.input_sets(2 * batch * tokens * width, most=4)
    shape = (batch, tokens, width)
    inputs = [torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(sets)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradient = torch.randn(shape, device="cuda", dtype=DTYPE)
    parameters = list(block.parameters())

    def forward(x):
        with torch.no_grad():
            return block(x)

    def both(x):
        return torch.autograd.grad(block(x), [x, *parameters], gradient)

    return (
        harness.graph_time([lambda x=x: forward(x) for x in inputs], repeats=2),
        harness.graph_time([lambda x=x: both(x) for x in leaves], repeats=1),
    )
