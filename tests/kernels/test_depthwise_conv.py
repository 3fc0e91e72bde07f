"""The depthwise convolution equals PyTorch's, forward and backward."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastadapt.fusion.image_operators import image_operators
from fastadapt.kernels import depthwise_conv2d, depthwise_conv2d_reference
from tests.helpers.depthwise_calls import random_case
from tests.helpers.kernel_checks import (
    FIRST_CASE,
    RANDOM_CASES,
    gpu,
    interpreted,
    starts_interpreter,
)

# batch, channels, height, width, filter, stride, padding
CASES = [
    (2, 5, 9, 7, 3, 1, 1),
    (1, 33, 10, 11, 5, 2, 2),
    (1, 40, 6, 6, 7, 1, 3),
    (1, 4, 6, 6, 3, 2, 0),
    (2, 8, 7, 7, 5, 3, 1),
    (1, 16, 5, 4, 2, 1, 1),
    (2, 3, 9, 9, 1, 2, 0),
    (1, 20, 12, 13, 9, 4, 4),
]
# The last has remainders that the compiler once mixed up: the gradient of x was half wrong.
LARGER = [(8, 144, 75, 75, 5, 2, 2), (4, 128, 56, 56, 7, 1, 3), (10, 16, 28, 28, 7, 3, 6)]


def relative(found, truth):
    return ((found.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def run(convolve, case, dtype, device, weight_dtype=torch.float32, seed=0):
    """Output and gradients of x, weight and bias; x is sliced, its gradient expanded."""
    batch, channels, height, width, k, stride, padding = case
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(batch, channels + 3, height, width, generator=generator).to(device, dtype)
    x = wide[:, 2 : 2 + channels].detach().requires_grad_()
    weight = torch.randn(channels, 1, k, k, generator=generator).to(device, weight_dtype)
    bias = torch.randn(channels, generator=generator).to(device, weight_dtype)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    y = convolve(x, weight, bias, stride, padding)
    g = torch.randn(1, channels, 1, 1, generator=generator).to(device, dtype).expand_as(y)
    return [y, *torch.autograd.grad(y, (x, weight, bias), g)]


def truth_of(case, dtype, device, seed=0):
    """The same in fp64, of inputs rounded to the dtype."""
    batch, channels, height, width, k, stride, padding = case

    def convolve(x, weight, bias, stride, padding):
        return F.conv2d(x, weight, bias, stride, padding, 1, channels)

    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(batch, channels + 3, height, width, generator=generator).to(device, dtype)
    x = wide[:, 2 : 2 + channels].double().requires_grad_()
    weight = torch.randn(channels, 1, k, k, generator=generator).to(device).double()
    bias = torch.randn(channels, generator=generator).to(device).double()
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    y = convolve(x, weight, bias, stride, padding)
    g = torch.randn(1, channels, 1, 1, generator=generator).to(device, dtype)
    return [y, *torch.autograd.grad(y, (x, weight, bias), g.double().expand_as(y))]


@starts_interpreter
def test_remainders_are_whole_registers(tmp_path):
    """Two of them as halves of one register are what ptxas mixed up."""
    pytest.importorskip("triton")
    from tests.helpers import compiled_kernels as gpus

    case = (10, 16, 28, 28, 7, 3, 6, torch.float16, torch.float32)
    launches = gpus.compiled(partial(gpus.depthwise_conv2d, *case), 90, cache=tmp_path)
    kernel = next(each for each in launches if each.kernel == "input_gradient_kernel")
    assert "div" in kernel.ptx and "s16x2" not in kernel.ptx


@interpreted
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_kernels(case, dtype, poisoned_empty):
    def ours(*args):
        return depthwise_conv2d(*args, backend="triton")

    found, expected = run(ours, case, dtype, "cpu"), truth_of(case, dtype, "cpu")
    budget = 1e-6 if dtype == torch.float32 else 1e-3
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative(one, other) < budget


@gpu
@pytest.mark.parametrize("case", [*CASES, *LARGER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_at_most_twice_pytorchs(case, dtype):
    def ours(*args):
        return depthwise_conv2d(*args, backend="triton")

    expected = truth_of(case, dtype, "cuda")
    found, pytorch = (run(f, case, dtype, "cuda") for f in (ours, depthwise_conv2d_reference))
    for one, other, truth in zip(found, pytorch, expected, strict=True):
        assert relative(one, truth) <= 2 * relative(other, truth) + 1e-7


@gpu
def test_gpu_random():
    """FASTADAPT_RANDOM_CASES calls with random sizes, dtypes and strides."""
    cases = range(FIRST_CASE, FIRST_CASE + RANDOM_CASES)
    wrong = [", ".join(found) for case in cases if (found := random_case(case))]
    assert not wrong, "\n".join(wrong)


@interpreted
def test_interpreted_random():
    for case in range(3):
        assert random_case(case, "cpu", small=True) == []


@gpu
def test_backbones_on_a_gpu_run_it_and_agree():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=0).cuda().eval()
    x = torch.randn(3, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = model(x)
        with image_operators(model, x) as mode:
            assert mode is not None
            found = model(x)
    assert relative(found, expected.double()) < 2e-2
    with image_operators(model, x) as mode:  # fp32 is left alone
        assert mode is None


@interpreted
@pytest.mark.parametrize(
    ("k", "stride", "padding", "end"), [(3, 2, 0, 1), (5, 2, 1, 2), (3, 1, 2, 0)]
)
def test_interpreted_kernels_pad_the_end_otherwise(k, stride, padding, end, poisoned_empty):
    case = (2, 5, 10, 8, k, stride, padding)

    def convolve(function, backend):
        return lambda *args: function(*args, padding_end=end, **backend)

    found = run(convolve(depthwise_conv2d, {"backend": "triton"}), case, torch.float32, "cpu")
    expected = run(convolve(depthwise_conv2d_reference, {}), case, torch.float32, "cpu")
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative(one, other.double()) < 1e-5


def test_reference_is_pytorchs():
    x, weight = torch.randn(2, 6, 9, 8), torch.randn(6, 1, 3, 3)
    expected = F.conv2d(x, weight, None, 2, 1, 1, 6)
    assert torch.equal(depthwise_conv2d(x, weight, None, 2, 1), expected)
    assert torch.equal(depthwise_conv2d(x, weight, None, 2, 1, backend="reference"), expected)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 6, 9), (6, 1, 3, 3)), {}, "expected \\[B, C, H, W\\]"),
        (((2, 6, 9, 9), (5, 1, 3, 3)), {}, "expected \\[C=6, 1, K, K\\]"),
        (((2, 6, 9, 9), (6, 1, 3, 5)), {}, "expected \\[C=6, 1, K, K\\]"),
        (((2, 6, 9, 9), (6, 1, 3, 3)), {"stride": 0}, "stride is 0"),
        (((2, 6, 2, 9), (6, 1, 5, 5)), {"padding": 1}, "smaller than the filter, 5 × 5"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, options, message):
    x, weight = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(x, weight, **options)
