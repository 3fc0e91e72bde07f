"""The norm of shifted rows equals PyTorch's."""

import pytest
import torch

from fastadapt.bench.harness import relative_error
from fastadapt.kernels import BackendError
from fastadapt.kernels.common.e4m3 import CAPABILITY, E4M3, norm_factor
from fastadapt.kernels.shifted_norm.op import shifted_norm
from fastadapt.kernels.shifted_norm.reference import shifted_norm_reference
from tests.helpers.kernel_checks import gpu, interpreted


def assert_as_exact(shape, dtype, device):
    generator = torch.Generator().manual_seed(shape[-1])
    # A mean as large as is seen in residual streams.
    x = (torch.randn(shape, generator=generator) + 3).to(device, dtype)
    shift, weight, bias = (torch.randn(shape[-1], generator=generator).to(device) for _ in range(3))
    for rows in (x, x[:, 2:]):
        for args in ((None, 1e-5), (shift, 1e-5), (shift, 1e-5, weight, bias)):
            wide = [t.double() if torch.is_tensor(t) else t for t in args]
            truth = shifted_norm_reference(rows.double(), *wide)
            theirs = relative_error(shifted_norm_reference(rows, *args), truth)
            found = shifted_norm(rows, *args, backend="triton")
            assert relative_error(found, truth) <= 2 * theirs + 1e-7


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_interpreted_norms(dtype, poisoned_empty):
    assert_as_exact((3, 7, 40), dtype, "cpu")


@gpu
@pytest.mark.parametrize("shape", [(3, 7, 40), (64, 197, 768), (2, 50, 1000)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_at_most_twice_pytorchs(shape, dtype):
    assert_as_exact(shape, dtype, "cuda")


@gpu
@pytest.mark.parametrize("shape", [(3, 7, 40), (64, 197, 768)])
def test_gpu_norms_in_e4m3_are_rounded_once(shape):
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("the GPU knows no e4m3")
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16) + 3
    shift, factor = torch.randn(shape[-1], device="cuda"), norm_factor(shape[-1])
    found = shifted_norm(x, shift, 1e-5, factor=factor, backend="triton")
    expected = shifted_norm_reference(x, shift, 1e-5, factor=factor)
    assert found.dtype == expected.dtype == E4M3
    # Where fp32 is near the middle between two numbers, either is right.
    assert (found.view(torch.uint8) != expected.view(torch.uint8)).float().mean() < 1e-3
    assert relative_error(found.float(), expected.float()) < 2e-3


def test_doubles_are_pytorchs():
    x = torch.randn(3, 5, dtype=torch.float64)
    expected = torch.nn.functional.layer_norm(x + 1, (5,), eps=1e-5)
    torch.testing.assert_close(shifted_norm(x, x.new_ones(5), 1e-5), expected)
    with pytest.raises(BackendError, match="cannot run this call"):
        shifted_norm(x, None, 1e-5, backend="triton")
