"""Batch norm with an activation equals PyTorch's, forward, backward, and in what it keeps."""

import pytest
import torch

from fastadapt.kernels import batch_norm_act, batch_norm_act_reference
from tests.helpers.batch_norm_calls import random_case
from tests.helpers.kernel_checks import FIRST_CASE, RANDOM_CASES, gpu, interpreted

# batch, channels, height, width, activation, running statistics
CASES = [
    (2, 24, 8, 8, "relu6", True),
    (3, 5, 7, 9, "relu", True),
    (1, 130, 5, 3, "none", False),
    (4, 16, 2, 4, "silu", True),
]


def relative(found, truth):
    return ((found.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def run(norm, case, dtype, device, wide=False):
    """Output, gradients of x, weight and bias, and running statistics; inputs are sliced."""
    batch, channels, height, width, activation, keeps = case
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape, scale=1.0, shift=0.0):
        values = scale * torch.randn(*shape, generator=generator) + shift
        values = values.to(device, dtype if len(shape) == 4 else torch.float32)
        return values.double() if wide else values

    x = numbers(batch, channels + 3, height, width, scale=2.0, shift=3.0)[:, 2 : 2 + channels]
    x = x.detach().requires_grad_()
    weight, bias = numbers(channels).requires_grad_(), numbers(channels, scale=3).requires_grad_()
    running = (numbers(channels), numbers(channels).abs()) if keeps else (None, None)
    y = norm(x, weight, bias, *running, 0.2, 1e-3, activation)
    g = numbers(1, channels, height, width).expand_as(y)
    found = [y, *torch.autograd.grad(y, (x, weight, bias), g)]
    return [*found, *running] if keeps else found


@interpreted
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_kernels(case, dtype, poisoned_empty):
    def ours(*args):
        return batch_norm_act(*args, backend="triton")

    found = run(ours, case, dtype, "cpu")
    expected = run(batch_norm_act_reference, case, dtype, "cpu", wide=True)
    budget = 3e-6 if dtype == torch.float32 else 2e-3
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative(one, other) < budget


@gpu
@pytest.mark.parametrize("case", [*CASES, (8, 144, 75, 75, "relu6", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_at_most_twice_pytorchs(case, dtype):
    def ours(*args):
        return batch_norm_act(*args, backend="triton")

    expected = run(batch_norm_act_reference, case, dtype, "cuda", wide=True)
    found, pytorch = (run(norm, case, dtype, "cuda") for norm in (ours, batch_norm_act_reference))
    for one, other, truth in zip(found, pytorch, expected, strict=True):
        assert relative(one, truth) <= 2 * relative(other, truth) + 3e-7


def test_reference_is_chosen_on_a_cpu():
    case = CASES[0]
    found = run(batch_norm_act, case, torch.float32, "cpu")
    for one, other in zip(
        found, run(batch_norm_act_reference, case, torch.float32, "cpu"), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 6, 9), (6,)), {}, "expected \\[B, C, H, W\\]"),
        (((2, 6, 9, 9), (5,)), {}, "weight has shape \\(5,\\); expected \\[C=6\\]"),
        (((1, 6, 1, 1), (6,)), {}, "more than one value a channel"),
        (((2, 6, 9, 9), (6,)), {"activation": "tanh"}, "activation is 'tanh'"),
        (((2, 6, 9, 9), (6,)), {"running_mean": torch.zeros(6)}, "expected both, or neither"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, options, message):
    x, weight = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        batch_norm_act(x, weight, weight, **options)


@interpreted
def test_interpreted_random():
    for case in (0, 1, 34):
        assert random_case(case, "cpu", small=True) == []


@gpu
def test_gpu_random():
    """FASTADAPT_RANDOM_CASES calls with random sizes, dtypes and strides."""
    cases = range(FIRST_CASE, FIRST_CASE + RANDOM_CASES)
    wrong = [", ".join(found) for case in cases if (found := random_case(case))]
    assert not wrong, "\n".join(wrong)
