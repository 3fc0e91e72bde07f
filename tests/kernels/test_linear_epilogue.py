"""A linear layer and what follows it: the reference on a CPU, cuBLASLt on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from fastadapt.kernels.common.dispatch import BackendError
from fastadapt.kernels.common.e4m3 import E4M3, LARGEST, norm_factor, to_e4m3
from fastadapt.kernels.linear_epilogue.op import linear_epilogue
from tests.helpers.kernel_checks import gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# What follows the product, by name.
EPILOGUES = {
    "nothing": {},
    "bias": {"bias": True},
    "GELU": {"bias": True, "gelu": True},
    "GELU without bias": {"gelu": True},
    "e4m3": {"bias": True, "factor": 16.0},
    "GELU to e4m3": {"bias": True, "gelu": True, "factor": 16.0},
    "sum": {"residual": True},
    "bias and sum": {"bias": True, "residual": True},
    "bias and sum in fp32": {"bias": True, "residual": True, "wide": True},
    "sum in new memory": {"residual": True, "in_place": False},
    "bias and sum in new memory, fp32": {
        "bias": True,
        "residual": True,
        "wide": True,
        "in_place": False,
    },
}


def operands(shape, dtype, how, device="cpu"):
    """Draw a call's arguments; numbers of [rows, outputs, inputs]."""
    rows, outputs, inputs = shape
    half = BF16 if dtype == E4M3 else dtype
    if "wide" in how:
        half = FP32
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs) / inputs**0.5
    alpha = 1.0
    if dtype == E4M3:
        x, weight, alpha = to_e4m3(x, 16), to_e4m3(weight, 64), 1 / 1024
    given = {"alpha": alpha, **{key: value for key, value in how.items() if key != "wide"}}
    for name, size in (("bias", (outputs,)), ("residual", (rows, outputs))):
        if name in how:
            given[name] = torch.randn(size).to(device, half)
    return x.to(device, dtype), weight.to(device, dtype), given


def exact(x, weight, given):
    """Compute in fp64, without the last rounding."""
    y = given["alpha"] * (x.double() @ weight.double().t())
    if given.get("bias") is not None:
        y += given["bias"].double()
    if given.get("gelu"):
        y = F.gelu(y, approximate="tanh")
    if given.get("residual") is not None:
        y += given["residual"].double()
    return y


def in_numbers(out, factor):
    return out.double() if factor is None else out.double() / factor


def called(x, weight, given, backend):
    given = dict(given)
    residual = given.get("residual")
    if residual is not None:
        given["residual"] = residual.clone()
    out = linear_epilogue(x, weight, **given, backend=backend)
    if residual is not None:
        assert out.dtype == residual.dtype
        if given.get("in_place", True):
            assert out is given["residual"]
        else:
            assert torch.equal(given["residual"], residual)
    return out


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("dtype", [FP32, BF16, E4M3])
def test_the_reference_is_the_formula(name, dtype):
    how = EPILOGUES[name]
    if "wide" in how and dtype == E4M3:
        x = torch.ones(2, 16).to(E4M3)
        with pytest.raises(ValueError, match=r"residual is torch.float32; expected torch.bfloat16"):
            linear_epilogue(x, x, residual=torch.ones(2, 2))
        return
    if "factor" in how and dtype != E4M3:
        with pytest.raises(ValueError, match="`factor` goes with x in e4m3"):
            linear_epilogue(torch.ones(2, 16), torch.ones(16, 16), factor=2.0)
        return
    x, weight, given = operands((5, 32, 48), dtype, how)
    out = called(x, weight, given, "auto")
    factor = given.get("factor")
    if "residual" not in how:
        assert out.dtype == (E4M3 if factor else BF16 if dtype == E4M3 else dtype)
    limit = 0.07 if factor else 1e-5 if dtype == FP32 else 0.02
    torch.testing.assert_close(
        in_numbers(out, factor), exact(x, weight, given), rtol=limit, atol=limit
    )


def test_what_does_not_fit_is_refused():
    x, weight = torch.ones(3, 16), torch.ones(32, 16)
    for args, given, message in (
        ((x[0], weight), {}, r"expected \[M, K\]"),
        ((x, weight.half()), {}, "expected one dtype"),
        ((x, weight, torch.ones(3)), {}, r"expected \[N=32\]"),
        ((x, weight), {"residual": x}, r"expected \(3, 32\)"),
        ((x, weight), {"residual": torch.ones(3, 32).half()}, "residual is torch.float16"),
        ((x, weight), {"residual": torch.ones(3, 32), "gelu": True}, "without GELU"),
        ((x, weight), {"backend": "cuda"}, "backend is 'cuda'; expected one of auto"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_epilogue(*args, **given)
    with pytest.raises(BackendError, match="x is on device cpu; expected an NVIDIA GPU"):
        linear_epilogue(x, weight, backend="cublas")


@pytest.mark.parametrize("channels", [8, 64, 768, 1000, 4096])
def test_no_normalised_row_is_cut_off(channels):
    x = torch.zeros(channels)
    x[0] = 1e4  # the largest number that a normalised row can have
    largest = F.layer_norm(x, (channels,)).abs().max()
    assert LARGEST / 2.01 < largest * norm_factor(channels) <= LARGEST


@gpu
@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize("dtype", [BF16, FP16, E4M3])
@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 64, 32), (1576, 768, 3072), (300, 2304, 768)])
def test_gpu_is_the_reference(name, dtype, shape):
    how = EPILOGUES[name]
    if "factor" in how and dtype != E4M3:
        pytest.skip("e4m3 alone is rounded to e4m3")
    if dtype == E4M3 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no products in e4m3")
    if "wide" in how and dtype == E4M3:
        pytest.skip("e4m3 is added in bf16 alone")
    x, weight, given = operands(shape, dtype, how, "cuda")
    truth, factor = exact(x, weight, given), given.get("factor")

    def error(out):
        return (in_numbers(out, factor) - truth).norm() / truth.norm()

    theirs = error(called(x, weight, given, "reference"))
    first = called(x, weight, given, "cublas")  # times the proposals
    assert error(first) <= 2 * theirs + 1e-3
    assert torch.equal(
        called(x, weight, given, "cublas").view(torch.uint8), first.view(torch.uint8)
    )


@gpu
def test_gpu_results_that_are_too_large_are_cut_off():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no products in e4m3")
    x = torch.full((16, 64), 4.0, device="cuda").to(E4M3)
    out = linear_epilogue(x, x, factor=2.0, backend="cublas")
    assert (out.float() == LARGEST).all()


@gpu
def test_gpu_what_cublas_does_not_take():
    x = torch.ones(4, 24, device="cuda", dtype=BF16)
    for tensors, message in (
        ((x, x.new_ones(12, 24)), "multiples of 8"),
        ((x.float(), x.new_ones(16, 24).float()), "dtype torch.float32"),
        ((x[:, 8:], x.new_ones(16, 16)), "not contiguous"),
        ((x.flatten()[8:80].view(3, 24), x.new_ones(16, 24)), "aligned to 256 bytes"),
    ):
        with pytest.raises(BackendError, match=message):
            linear_epilogue(*tensors, backend="cublas")
        assert linear_epilogue(*tensors).shape == (len(tensors[0]), len(tensors[1]))
