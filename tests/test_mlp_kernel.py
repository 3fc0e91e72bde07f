"""The residual MLP: the layers of a CLAdapter block, and the kernels that replace them."""

from __future__ import annotations

import pytest
import torch

from fastadapt.kernels import BackendError, residual_mlp, residual_mlp_reference


def make(rows, width, hidden, dtype, device="cpu"):
    def normal(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(device, dtype)

    args = [normal(rows, width), normal(rows, width)]
    args += [normal(hidden, width, scale=width**-0.5), normal(hidden)]
    args += [normal(width, hidden, scale=hidden**-0.5), normal(width)]
    return args, normal(rows, width)


def output_and_gradients(function, args, g, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in args]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, g.to(dtype))]


def test_cpu_is_the_layers():
    args, _ = make(6, 8, 32, torch.float32)
    assert torch.equal(residual_mlp(*args), residual_mlp_reference(*args))
    with pytest.raises(BackendError, match="Hopper"):
        residual_mlp(*args, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "hidden"), [(25_088, 768, 3072), (12_544, 1280, 5120), (20_001, 392, 1000)]
)
def test_gpu_as_exact_as_pytorch(rows, width, hidden, dtype):
    args, g = make(rows, width, hidden, dtype, "cuda")
    truth = output_and_gradients(residual_mlp_reference, args, g, torch.float64)
    reference = output_and_gradients(residual_mlp_reference, args, g, dtype)
    ours = output_and_gradients(lambda *a: residual_mlp(*a, backend="triton"), args, g, dtype)
    names = ("y", "x", "residual", "weight1", "bias1", "weight2", "bias2")
    for name, mine, theirs, exact in zip(names, ours, reference, truth, strict=True):
        error = float((mine.double() - exact).norm() / exact.norm())
        limit = float((theirs.double() - exact).norm() / exact.norm())
        assert error <= 2 * limit + 1e-7, f"{name}: {error:.2e}, PyTorch {limit:.2e}"
