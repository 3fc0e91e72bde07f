"""Depthwise convolution with normalisation equals PyTorch's."""

import pytest
import torch

from fastadapt.bench.harness import relative_error
from fastadapt.kernels import BackendError
from fastadapt.kernels.common.e4m3 import CAPABILITY, E4M3, norm_factor
from fastadapt.kernels.depthwise_norm.op import depthwise_norm
from fastadapt.kernels.depthwise_norm.reference import depthwise_norm_reference
from tests.helpers.kernel_checks import gpu, interpreted

# batch, height, width, channels, a bias for every pixel
CASES = [(1, 3, 7, 24, False), (1, 2, 9, 16, True)]
LARGE = [
    (8, 56, 56, 128, False),
    (3, 14, 14, 512, True),
    (5, 7, 7, 1024, True),
    (2, 13, 22, 96, True),
]


def make(case, dtype, device="cpu"):
    batch, height, width, channels, bias_map = case
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(batch, height, width, channels, generator=generator).to(device, dtype)
    weight = (torch.randn(49, channels, generator=generator) / 7).to(device, dtype)
    shape = (height, width, channels) if bias_map else (channels,)
    return x, weight, torch.randn(shape, generator=generator).to(device)


def assert_as_exact(case, dtype, device, result=None):
    args = make(case, dtype, device)
    truth = depthwise_norm_reference(*(t.double() for t in args))
    theirs = relative_error(depthwise_norm_reference(*args, dtype=result), truth)
    found = depthwise_norm(*args, dtype=result, backend="triton")
    assert found.dtype == (result or dtype)
    assert relative_error(found, truth) <= 2 * theirs + 1e-7


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_interpreted_convolution(case, poisoned_empty):
    assert_as_exact(case, torch.float16, "cpu")


@interpreted
def test_interpreted_strips_of_four():
    from fastadapt.kernels.depthwise_norm import launches
    from fastadapt.kernels.depthwise_norm.block_sizes import StripTile

    args = make((1, 3, 9, 16, True), torch.float32)
    truth = depthwise_norm_reference(*(t.double() for t in args))
    tile = StripTile(4, 2, 2, 4)
    for dtype, limit in ((None, 1e-6), (torch.float16, 1e-3)):
        assert relative_error(launches.convolve(*args, 1e-6, tile, dtype=dtype), truth) < limit


def assert_as_exact_ahead(operator, case, dtype, device):
    """Compare the operator that compilers look into with PyTorch's convolution and norm."""
    x, weight, bias = make((*case[:4], False), dtype, device)
    vectors = [torch.randn(case[3]).to(device, dtype) for _ in range(2)]

    def plain(x, weight, bias, g, h):
        normal = depthwise_norm_reference(x, weight, bias)
        return normal * g + h

    args = (x, weight, bias.to(dtype), *vectors)
    truth = plain(*(t.double() for t in args))
    theirs = relative_error(plain(*args), truth)
    assert relative_error(operator(*args, 1e-6), truth) <= 2 * theirs + 1e-6


@interpreted
def test_interpreted_operator_of_compilers(monkeypatch, poisoned_empty):
    from fastadapt.kernels.depthwise_norm import aot

    monkeypatch.setattr(aot, "wrap_triton", lambda kernel: kernel)
    operator = aot.depthwise_layer_norm._init_fn
    assert_as_exact_ahead(operator, (1, 2, 7, 24), torch.float16, "cpu")


@gpu
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_operator_of_compilers(case, dtype):
    from fastadapt.kernels.depthwise_norm.aot import depthwise_layer_norm

    assert_as_exact_ahead(depthwise_layer_norm, case, dtype, "cuda")


@gpu
@pytest.mark.parametrize("case", LARGE)
def test_gpu_results_in_e4m3(case):
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("the GPU knows no e4m3")
    args, factor = make(case, torch.bfloat16, "cuda"), norm_factor(case[3])
    found = depthwise_norm(*args, factor=factor, backend="triton")
    assert found.dtype == E4M3
    exact = depthwise_norm(*args, backend="triton").float()
    expected = depthwise_norm_reference(*args).float()
    assert relative_error(found.float() / factor, exact) < 0.04  # e4m3 has three bits
    assert relative_error(found.float() / factor, expected) < 0.04


@gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_at_most_twice_pytorchs(case, dtype):
    assert_as_exact(case, dtype, "cuda")
    if dtype == torch.float32:
        assert_as_exact(case, dtype, "cuda", torch.bfloat16)


def test_the_reference_is_timms():
    from timm.models.convnext import ConvNeXtBlock

    block = ConvNeXtBlock(16).eval()
    x = torch.randn(2, 16, 9, 8)
    with torch.no_grad():
        weight = block.conv_dw.weight.flatten(1).t()
        found = depthwise_norm(x.permute(0, 2, 3, 1), weight, block.conv_dw.bias)
        expected = block.norm(block.conv_dw(x).permute(0, 2, 3, 1))
        torch.testing.assert_close(found, expected)


def test_what_does_not_fit_is_refused():
    x, weight, bias = make(CASES[0], torch.float32)
    with pytest.raises(ValueError, match=r"expected \[B, H, W, C\]"):
        depthwise_norm(x[0], weight, bias)
    with pytest.raises(ValueError, match=r"expected \(49, C=24\)"):
        depthwise_norm(x, weight[:9], bias)
    with pytest.raises(ValueError, match=r"expected \[C=24\] or \[3, 7, 24\]"):
        depthwise_norm(x, weight, bias[:3])
    with pytest.raises(BackendError, match="cannot run this call"):
        depthwise_norm(x.double(), weight, bias, backend="triton")
