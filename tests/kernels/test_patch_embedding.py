"""Products with patches equal PyTorch's strided convolutions."""

import pytest
import torch
import torch.nn.functional as F

from fastadapt.bench.harness import relative_error
from fastadapt.kernels import BackendError
from fastadapt.kernels.patch_embedding.checks import Norm
from fastadapt.kernels.patch_embedding.op import patch_embedding
from fastadapt.kernels.patch_embedding.reference import patch_embedding_reference
from tests.helpers.kernel_checks import gpu, interpreted

# batch, height, width, channels, patch, width of the result, prefix tokens, bytes, norm
CASES = [
    (2, 32, 48, 3, 16, 40, 1, True, False),
    (2, 16, 24, 3, 4, 24, 0, True, True),
    (3, 8, 12, 16, 2, 72, 0, False, False),
    (2, 24, 24, 3, 8, 16, 5, True, False),
]
LARGE = [
    (8, 224, 224, 3, 16, 768, 1, True, False),
    (4, 224, 224, 3, 4, 128, 0, True, True),
    (4, 28, 28, 256, 2, 512, 0, False, False),
]


def make(case, dtype, device="cpu"):
    batch, height, width, channels, patch, outputs, prefix, is_bytes, norm = case
    generator = torch.Generator().manual_seed(patch)
    shape = (batch, height, width, channels)
    if is_bytes:
        x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    else:
        x = torch.randn(shape, generator=generator).to(device, dtype)
    depth, tokens = patch * patch * channels, prefix + height * width // patch**2
    scale = depth**-0.5 / (64 if is_bytes else 1)
    weight = (scale * torch.randn(outputs, depth, generator=generator)).to(device, dtype)
    table = torch.randn((tokens, outputs) if prefix else (outputs,), generator=generator)
    vectors = [torch.randn(outputs, generator=generator).to(device) for _ in range(2)]
    return (x, weight, table.to(device), patch), Norm(*vectors, 1e-6) if norm else None


def assert_as_exact(case, dtype, device):
    (x, weight, table, patch), norm = make(case, dtype, device)
    wide = x if x.dtype == torch.uint8 else x.double()
    norm64 = norm and Norm(norm.weight.double(), norm.bias.double(), norm.eps)
    truth = patch_embedding_reference(wide, weight.double(), table.double(), patch, norm64)
    theirs = relative_error(patch_embedding_reference(x, weight, table, patch, norm), truth)
    ours = patch_embedding(x, weight, table, patch, norm=norm, backend="triton")
    # In fp32 a sum over all columns in order, where cuBLAS adds parts of it.
    slack = 3e-7 if dtype == torch.float32 else 1e-7
    assert relative_error(ours, truth) <= 2 * theirs + slack


@interpreted
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_interpreted_products(case, dtype, poisoned_empty):
    assert_as_exact(case, dtype, "cpu")


@gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_at_most_twice_pytorchs(case, dtype):
    assert_as_exact(case, dtype, "cuda")


def test_the_reference_is_a_strided_convolution():
    (x, weight, table, patch), _ = make(CASES[2], torch.float32)
    filters = weight.unflatten(1, (patch, patch, x.shape[3])).permute(0, 3, 1, 2)
    expected = F.conv2d(x.permute(0, 3, 1, 2), filters, table, patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patch_embedding(x, weight, table, patch), expected)


def test_what_does_not_fit_is_refused():
    (x, weight, table, patch), _ = make(CASES[0], torch.float32)
    with pytest.raises(ValueError, match="multiples of the patch, 16"):
        patch_embedding(x[:, :30], weight, table, patch)
    with pytest.raises(ValueError, match=r"expected \[C, 768\]"):
        patch_embedding(x, weight[:, 1:], table, patch)
    with pytest.raises(ValueError, match="N=6 patches or more"):
        patch_embedding(x, weight, table[:4], patch)
    norm = Norm(torch.ones(3), torch.ones(40), 1e-6)
    with pytest.raises(ValueError, match=r"norm.weight has shape \(3,\); expected \[C=40\]"):
        patch_embedding(x, weight, table, patch, norm=norm)
    with pytest.raises(BackendError, match="cannot run this call"):
        patch_embedding(x, weight.double(), table, patch, backend="triton")
