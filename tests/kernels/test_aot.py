"""The kernels that AOTInductor stores, against the folded layer's ordinary operators."""

import pytest
import torch

import fastadapt as fa
from fastadapt.export.folded_layers import FoldedClusterAttention
from tests.helpers.kernel_checks import INTERPRETING, interpreted

CASES = [  # batch, tokens, channels, centers, rank (None: token mode)
    (1, 7, 40, 5, 12),
    (5, 1, 33, 1, 8),
    (67, 3, 700, 20, 9),
    (3, 9, 48, 100, None),
]


def make(case, dtype, device="cpu"):
    """A folded layer that uses the kernels, and tokens."""
    batch, tokens, width, centers, rank = case
    mode = {"mode": "token", "num_tokens": tokens} if rank is None else {"rank": rank}
    layer = FoldedClusterAttention(fa.ClusterAttention(width, num_centers=centers, **mode))
    layer = layer.to(device, dtype).eval().requires_grad_(False)
    return layer, torch.randn(batch, tokens, width).to(device, dtype)


def check(layer, x):
    """Within twice the error of PyTorch in the same dtype, against fp64."""
    ordinary = layer._mixed(x)
    truth = layer.double()._mixed(x.double())
    layer.to(x.dtype).kernels = True
    got = layer._mixed(x)
    assert (got.shape, got.dtype) == (ordinary.shape, ordinary.dtype)
    error, allowed = ((y.double() - truth).abs().max() for y in (got, ordinary))
    assert error <= 2 * allowed + torch.finfo(x.dtype).eps * truth.abs().max()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case, dtype, monkeypatch, poisoned_empty):
    from fastadapt.kernels.cluster_attention import aot as module

    monkeypatch.setattr(module, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(module, "mixed_transforms", module.mixed_transforms._init_fn)
    check(*make(case, dtype))


@pytest.mark.skipif(INTERPRETING, reason="traces what is compiled")
@pytest.mark.parametrize("case", CASES[:1] + CASES[3:])
def test_is_traced_with_a_dynamic_batch(case):
    pytest.importorskip("triton")
    layer, x = make(case, torch.bfloat16)
    layer.kernels = True
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(layer, (x.repeat(2, 1, 1),), dynamic_shapes=(batch,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("fastadapt.mixed_transforms.default") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, (64, 196, 768, 20, 256)])
def test_agrees_on_a_gpu(case, dtype):
    check(*make(case, dtype, "cuda"))
