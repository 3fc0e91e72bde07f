"""Self-attention of a packed product equals PyTorch's."""

import pytest
import torch

from fastadapt.bench.harness import relative_error
from fastadapt.kernels import BackendError
from fastadapt.kernels.qkv_attention.checks import HeadNorms
from fastadapt.kernels.qkv_attention.op import qkv_attention
from fastadapt.kernels.qkv_attention.reference import qkv_attention_reference
from tests.helpers.kernel_checks import gpu, interpreted

# samples, tokens, heads, channels of a head
CASES = [(2, 197, 1, 64), (1, 50, 2, 32), (1, 5, 3, 16), (1, 64, 1, 32), (1, 300, 1, 16)]
LARGE = [(8, 197, 12, 64), (3, 257, 16, 64), (64, 50, 12, 64), (2, 577, 12, 64), (3, 196, 6, 128)]


def make(case, dtype, device="cpu", norms=False):
    batch, tokens, heads, size = case
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(batch, tokens, 3 * heads * size, generator=generator).to(device, dtype)
    vectors = [torch.randn(size, generator=generator).to(device, dtype) for _ in range(4)]
    return qkv, HeadNorms(*vectors, 1e-6) if norms else None


def truth_of(qkv, heads, norms=None, scale=None):
    if norms is not None:
        norms = HeadNorms(*(t.double() for t in norms[:4]), norms.eps)
    return qkv_attention_reference(qkv.double(), heads, norms=norms, scale=scale)


def assert_as_exact(case, dtype, device, norms):
    qkv, norms = make(case, dtype, device, norms)
    heads, scale = case[2], 0.2 if norms else None
    truth = truth_of(qkv, heads, norms, scale)
    theirs = relative_error(qkv_attention_reference(qkv, heads, norms=norms, scale=scale), truth)
    ours = qkv_attention(qkv, heads, norms=norms, scale=scale, backend="triton")
    assert relative_error(ours, truth) <= 2 * theirs + 1e-7


@interpreted
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("norms", [False, True])
def test_interpreted_attention(case, norms, poisoned_empty):
    assert_as_exact(case, torch.float16, "cpu", norms)


@interpreted
def test_interpreted_attention_in_fp32():
    assert_as_exact(CASES[1], torch.float32, "cpu", True)


@interpreted
def test_interpreted_variants_of_tiles():
    from fastadapt.kernels.qkv_attention import block_sizes, launches

    qkv, _ = make((1, 70, 1, 16), torch.float16)
    truth = truth_of(qkv, 1)
    for variant in block_sizes.VARIANTS:
        out = launches.attention(qkv, 1, 0.25, None, block_sizes.tile_of(70, **variant))
        assert relative_error(out, truth) < 1e-3, variant


@gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norms", [False, True])
def test_error_is_at_most_twice_pytorchs(case, dtype, norms):
    assert_as_exact(case, dtype, "cuda", norms)


@gpu
def test_gpu_large_scores_do_not_overflow():
    qkv = 60 * torch.randn(2, 197, 3 * 64, device="cuda", dtype=torch.bfloat16)
    found = qkv_attention(qkv, 1, backend="triton")
    assert relative_error(found, truth_of(qkv, 1)) < 1e-2


def test_the_reference_is_timms():
    from timm.layers import Attention

    layer = Attention(32, num_heads=2, qkv_bias=True).eval()
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        found = layer.proj(qkv_attention(layer.qkv(x), 2))
        torch.testing.assert_close(found, layer(x))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"expected \[B, N, 3·H·D\] with H=5"):
        qkv_attention(torch.randn(2, 7, 96), 5)
    with pytest.raises(ValueError, match=r"q_bias has shape \(3,\); expected \[D=16\]"):
        ones = torch.ones(16)
        qkv_attention(torch.randn(2, 7, 96), 2, norms=HeadNorms(ones, ones[:3], ones, ones, 1e-6))
    with pytest.raises(BackendError, match="cannot run this call"):
        qkv_attention(torch.randn(2, 7, 90), 2, backend="triton")
