"""Time the operations under pytest-benchmark: ``pytest bench --benchmark-only``.

It times eager calls of ours, launch to completion; ``fastadapt bench`` compares with other
formulations, replays CUDA graphs and knows targets.
"""

import pytest
import torch

from . import harness
from .operation import Case
from .suites import cladapter, cluster_attention, prompt_learner, quaternion_linear

SHAPES = cluster_attention.shapes(quick=True)
BATCHES = prompt_learner.BATCHES[:1]


def forward(benchmark, case: Case) -> None:
    """Time our forward pass."""
    provider, inputs = case.providers["ours"], case.inputs(0)

    @torch.no_grad()
    def call():
        provider.call(*inputs)
        harness.synchronize()

    benchmark(call)


def forward_backward(benchmark, case: Case) -> None:
    """Time our forward and backward pass."""
    provider, inputs = case.providers["ours"], case.inputs(0)
    leaves = [*(t for t in inputs if t.requires_grad), *provider.weights]

    def call():
        y = provider.call(*inputs)
        outputs = [y] if isinstance(y, torch.Tensor) else list(y)
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
        harness.synchronize()

    benchmark(call)


@pytest.mark.parametrize("direction", [forward, forward_backward])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cluster_attention(benchmark, shape, direction):
    direction(benchmark, cluster_attention.case(*shape))


@pytest.mark.parametrize("direction", [forward, forward_backward])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cladapter(benchmark, shape, direction):
    direction(benchmark, cladapter.case(*shape))


@pytest.mark.parametrize("direction", [forward, forward_backward])
@pytest.mark.parametrize("shape", quaternion_linear.shapes(quick=True), ids=str)
def test_quaternion_linear(benchmark, shape, direction):
    direction(benchmark, quaternion_linear.case(*shape))


@pytest.mark.parametrize("direction", [forward, forward_backward])
@pytest.mark.parametrize("batch", BATCHES)
def test_prompt_learner(benchmark, batch, direction):
    direction(benchmark, prompt_learner.case(batch))
