"""The MLP of few channels equals PyTorch's."""

import pytest
import torch

from fastadapt.bench.harness import relative_error
from fastadapt.kernels import BackendError
from fastadapt.kernels.narrow_mlp.op import narrow_mlp
from fastadapt.kernels.narrow_mlp.reference import narrow_mlp_reference
from tests.helpers.kernel_checks import gpu, interpreted

SIZES = [(70, 40, 136), (33, 64, 96)]  # rows, channels, hidden
LARGE = [(25088, 128, 512), (1000, 96, 384), (777, 80, 320)]


def make(size, dtype, device="cpu", sums=None):
    rows, width, hidden = size
    generator = torch.Generator().manual_seed(rows)

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device)

    x, residual = randn(rows, width).to(dtype), randn(rows, width).to(sums or dtype)
    fc1 = randn(hidden, width, scale=width**-0.5).to(dtype), randn(hidden)
    fc2 = randn(width, hidden, scale=hidden**-0.5).to(dtype), randn(width)
    return x, *fc1, *fc2, residual


def assert_as_exact(size, dtype, device, sums=None):
    args = make(size, dtype, device, sums)
    for form in ("none", "tanh"):
        truth = narrow_mlp_reference(*(t.double() for t in args), form)
        theirs = relative_error(narrow_mlp_reference(*args, form), truth)
        y = narrow_mlp(*args, approximate=form, backend="triton")
        assert y.dtype == (sums or dtype)
        assert relative_error(y, truth) <= 2 * theirs + 1e-7, form


@interpreted
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_interpreted_mlps(size, dtype, poisoned_empty):
    assert_as_exact(size, dtype, "cpu", torch.float32)


@gpu
@pytest.mark.parametrize("size", [*SIZES, *LARGE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sums", [None, torch.float32])
def test_error_is_at_most_twice_pytorchs(size, dtype, sums):
    assert_as_exact(size, dtype, "cuda", sums)


def test_what_does_not_fit_is_refused():
    x, fc1, fc1_bias, fc2, fc2_bias, residual = make(SIZES[0], torch.float32)
    with pytest.raises(ValueError, match=r"expected \[M, C\] and \[H, C\]"):
        narrow_mlp(x[0], fc1, fc1_bias, fc2, fc2_bias, residual)
    with pytest.raises(ValueError, match=r"fc2_weight has shape \(136, 40\); expected \(40, 136\)"):
        narrow_mlp(x, fc1, fc1_bias, fc2.t(), fc2_bias, residual)
    with pytest.raises(ValueError, match="residual has shape"):
        narrow_mlp(x, fc1, fc1_bias, fc2, fc2_bias, residual[:3])
    with pytest.raises(BackendError, match="cannot run this call"):
        double = (t.double() for t in (x, fc1, fc1_bias, fc2, fc2_bias, residual))
        narrow_mlp(*double, backend="triton")
