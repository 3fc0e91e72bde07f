"""The residual MLP, and a linear layer with GELU: reference, interpreter, GPU.

The interpreter is chosen before Triton is imported, so its cases run in a process of their own:
``python -m pytest`` on this file with TRITON_INTERPRET=1, started by ``test_interpreter.py``.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastadapt.bench.harness import peak_memory, relative_error
from fastadapt.kernels import BackendError, residual_mlp, residual_mlp_reference
from fastadapt.kernels.residual_mlp.op import linear_gelu
from tests.helpers import row_operations
from tests.helpers.kernel_checks import (
    INTERPRETING,
    gpu,
    interpreted,
    output_and_gradients,
)
from tests.helpers.row_operations import KINDS, make

# The reference


def test_gradcheck():
    args, _ = make(residual_mlp, (2, 3, 5), 4, torch.float64)
    assert torch.autograd.gradcheck(residual_mlp_reference, [t.requires_grad_() for t in args])


def test_the_mlp_is_that_of_modules():
    (x, w, b, w1, b1, w2, b2), _ = make(residual_mlp, (2, 3, 5), 4, torch.float64)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-3).sqrt()
    h = (normal * w + b) @ w1.t() + b1
    gelu = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    y = residual_mlp_reference(x, w, b, w1, b1, w2, b2, 1e-3)
    torch.testing.assert_close(y, x + gelu @ w2.t() + b2)


def test_auto_on_the_cpu_is_the_reference():
    args, _ = make(residual_mlp, (2, 3, 8), 6, torch.float64)
    torch.testing.assert_close(residual_mlp(*args), residual_mlp_reference(*args), rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETING, reason="there the kernels do run on the CPU")
def test_triton_on_the_cpu_says_why_not():
    args, _ = make(residual_mlp, (2, 3, 8), 6, torch.float32)
    with pytest.raises(BackendError, match="cpu"):
        residual_mlp(*args, backend="triton")


def test_exported_and_compiled():
    row_operations.assert_exported_and_compiled(residual_mlp)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (7,), r"weight has shape \(7,\); expected \[C=8\] for x \(2, 3, 8\)"),
        ("bias", (8, 1), r"bias has shape \(8, 1\)"),
        ("fc1_weight", (6, 7), r"fc1_weight has shape \(6, 7\); expected \(6, 8\)"),
        ("fc1_bias", (5,), "fc1_bias has shape"),
        ("fc2_weight", (6, 8), r"fc2_weight has shape \(6, 8\); expected \(8, 6\)"),
        ("fc2_bias", (6,), "fc2_bias has shape"),
    ],
)
def test_shapes_that_do_not_fit(name, shape, message):
    row_operations.assert_shape_is_refused(residual_mlp, name, shape, message)


# The kernels in the interpreter. bf16 is wrong there, so fp16 and fp32.


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [((2, 9, 64), 256), ((1, 1, 40), 96), ((62, 16), 17), ((3, 5, 2, 63), 65), ((7, 8), 1)],
)
def test_interpreted_shapes(shape, hidden, dtype, poisoned_empty, few_programs):
    args, g = make(residual_mlp, shape, hidden, dtype)
    row_operations.assert_as_exact_as_pytorch(residual_mlp, args, g)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_strides(kind, poisoned_empty, few_programs):
    row_operations.assert_strides(residual_mlp, kind)


@interpreted
def test_interpreted_gradients_asked_for_singly(poisoned_empty, few_programs):
    args, g = make(residual_mlp, (2, 9, 24), 40, torch.float16)
    row_operations.assert_alone_as_together(residual_mlp, args, g)


@interpreted
def test_interpreted_retained_graph_and_second_derivative():
    args, g = make(residual_mlp, (2, 9, 24), 40, torch.float16)
    row_operations.assert_retained_graph_gives_the_same(residual_mlp, args, g)


@interpreted
@pytest.mark.parametrize("vectors", [torch.float32, torch.float16])
def test_interpreted_residual_mlp_is_an_operator(vectors):
    args, g = make(residual_mlp, (2, 9, 24), 40, torch.float16)
    args[4] = args[4].to(vectors)
    compiled = torch.compile(residual_mlp, fullgraph=True, backend="aot_eager")
    expected = output_and_gradients(residual_mlp, args, g)
    for mine, theirs in zip(output_and_gradients(compiled, args, g), expected, strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        assert torch.equal(compiled(*args), expected[0])
    args = [t.requires_grad_() for t in args]
    torch.library.opcheck(torch.ops.fastadapt.residual_mlp.default, (*args, 1e-5, True))


def assert_medians_are_as_exact_as_pytorch(shape, hidden, dtype, draws, device="cpu"):
    """The median over many draws tells what one draw of few numbers cannot; see the helper."""
    draw = partial(make, residual_mlp, shape, hidden, dtype, device)
    for name, (ours, theirs) in row_operations.median_errors(residual_mlp, draw, draws).items():
        assert ours <= 2 * theirs + 1e-7, f"{name}: {ours:.2e}, PyTorch {theirs:.2e}"


@interpreted
def test_interpreted_one_hidden_unit_by_medians():
    assert_medians_are_as_exact_as_pytorch((20, 16), 1, torch.float16, draws=11)


# A linear layer with GELU, which has no gradient


@torch.no_grad()
def assert_product_with_gelu(shape, hidden, dtype, device="cpu"):
    x, *_, weight, bias, _, _ = make(residual_mlp, shape, hidden, dtype, device)[0]
    y = linear_gelu(x, weight, bias, backend="triton")
    assert y.dtype == dtype and y.shape == (*shape[:-1], hidden)
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    theirs = F.gelu(F.linear(x, weight, bias))
    assert relative_error(y, exact) <= 2 * relative_error(theirs, exact) + 1e-7


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 9, 64), (62, 16), (3, 5, 2, 63)])
def test_interpreted_linear_gelu(shape, dtype, poisoned_empty):
    assert_product_with_gelu(shape, 33, dtype)


@pytest.mark.skipif(INTERPRETING, reason="there the kernels do run on the CPU")
def test_linear_gelu_on_the_cpu_is_the_reference():
    (x, _, _, fc1_weight, fc1_bias, *_), _ = make(residual_mlp, (2, 3, 8), 6, torch.float32)
    expected = F.gelu(F.linear(x, fc1_weight, fc1_bias))
    assert torch.equal(linear_gelu(x, fc1_weight, fc1_bias), expected)
    with pytest.raises(BackendError, match="cpu"):
        linear_gelu(x, fc1_weight, fc1_bias, backend="triton")


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "hidden"), [((128, 196, 768), 3072), ((3, 70, 1000), 65), ((40, 63), 1)]
)
def test_gpu_linear_gelu(shape, hidden, dtype, poisoned_empty):
    assert_product_with_gelu(shape, hidden, dtype, "cuda")


# The kernels on the GPU


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [
        ((128, 196, 768), 3072),
        ((64, 256, 1024), 4096),
        ((256, 49, 1280), 5120),
        ((1, 196, 768), 3072),
        ((3, 63, 1000), 60),
        ((40, 197, 96), 384),
        ((5, 33, 4096), 1000),
        ((4, 8192), 64),
        ((1, 1, 768), 3072),
        ((2, 3, 5, 100), 257),
    ],
)
def test_gpu_shapes(shape, hidden, dtype):
    args, g = make(residual_mlp, shape, hidden, dtype, "cuda")
    row_operations.assert_as_exact_as_pytorch(residual_mlp, args, g)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [
        ((128, 196, 768), 3072),
        ((17_000, 72), 264),  # tiles that are cut off on all sides, one step deep
        ((3, 3001, 200), 520),
        ((5000, 768), 1000),
        ((35_000, 8), 8),
    ],
)
def test_gpu_product_with_gelu(shape, hidden, dtype):
    """Sizes that Hopper's own kernel takes."""
    from fastadapt.kernels.residual_mlp import launches_hopper

    args, g = make(residual_mlp, shape, hidden, dtype, "cuda")
    rows, fc1_weight, fc1_bias, fc2_weight = args[0].flatten(0, -2), *args[3:6]
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert launches_hopper.takes(rows, fc1_weight) == hopper
    row_operations.assert_as_exact_as_pytorch(residual_mlp, args, g)
    if hopper:
        out, slope = launches_hopper.product_gelu(rows, fc1_weight, fc1_bias, save=True)
        assert torch.equal(
            launches_hopper.product_gelu(rows, fc1_weight, fc1_bias, save=False)[0], out
        )
        backward = partial(
            launches_hopper.product_gelu_backward, g.flatten(0, -2), fc2_weight, slope
        )
        assert torch.equal(backward(sums=False)[0], backward(sums=True)[0])


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "hidden"), [((17, 49, 1024), 1), ((3, 1000), 1), ((900, 64), 8)])
def test_gpu_few_hidden_units_by_medians(shape, hidden, dtype):
    assert_medians_are_as_exact_as_pytorch(shape, hidden, dtype, draws=101, device="cuda")


@gpu
def test_gpu_random():
    """FASTADAPT_RANDOM_CASES calls with random sizes, dtypes, strides and autocast."""
    row_operations.assert_random_cases(residual_mlp)


@gpu
@pytest.mark.parametrize("c", [200, 256, 768])
def test_gpu_output_is_the_same_without_gradients(c):
    row_operations.assert_output_is_the_same_without_gradients(residual_mlp, c)


@gpu
def test_gpu_gradients_asked_for_singly():
    args, g = make(residual_mlp, (4, 49, 96), 384, torch.bfloat16, "cuda")
    row_operations.assert_alone_as_together(residual_mlp, args, g)


@gpu
def test_gpu_retained_graph_and_second_derivative():
    args, g = make(residual_mlp, (4, 49, 96), 384, torch.bfloat16, "cuda")
    row_operations.assert_retained_graph_gives_the_same(residual_mlp, args, g)


@gpu
def test_gpu_opcheck():
    args, _ = make(residual_mlp, (4, 49, 96), 384, torch.bfloat16, "cuda")
    args = [t.requires_grad_() for t in args]
    torch.library.opcheck(torch.ops.fastadapt.residual_mlp.default, (*args, 1e-5, True))


@gpu
def test_gpu_compiles_whole():
    args, g = make(residual_mlp, (8, 100, 384), 1536, torch.bfloat16, "cuda")
    compiled = torch.compile(lambda *a: residual_mlp(*a), fullgraph=True)
    row_operations.assert_as_exact_as_pytorch(residual_mlp, args, g, compiled)


@gpu
def test_gpu_checkpoint_and_cuda_graph():
    row_operations.assert_checkpoint_and_cuda_graph(residual_mlp)


@gpu
def test_gpu_is_deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    row_operations.assert_deterministic(residual_mlp)


@gpu
def test_gpu_empty_and_uncovered():
    row_operations.assert_empty_and_uncovered(residual_mlp)
    args, _ = make(residual_mlp, (2, 5, 32), 64, torch.float32, "cuda")
    with (
        torch.autocast("cuda", torch.bfloat16),
        pytest.raises(BackendError, match=r"float32 under autocast to torch\.bfloat16"),
    ):
        residual_mlp(*args, backend="triton")


@gpu
def test_gpu_more_than_two_to_the_31_elements():
    row_operations.assert_more_than_two_to_the_31_elements(residual_mlp, 64, 4096)


@gpu
def test_gpu_memory():
    """As residual_mlp/op.py counts it: three times the hidden numbers, and rows of x's width."""
    m, c, hidden = 128 * 196, 768, 3072
    args, g = make(residual_mlp, (m, c), hidden, torch.bfloat16, "cuda")
    peak = peak_memory(lambda: output_and_gradients(residual_mlp, args, g))
    weights = 4 * c * hidden
    assert peak * 2**20 <= 2 * (3 * m * hidden + 2 * m * c + weights) + 2**25
    with torch.no_grad():
        residual_mlp(*args)
        # Without what the allocator adds, up to a MiB to each tensor.
        key = "requested_bytes.all"
        before = torch.cuda.memory_stats()[f"{key}.current"]
        torch.cuda.reset_peak_memory_stats()
        residual_mlp(*args)
        forward = torch.cuda.memory_stats()[f"{key}.peak"] - before
    assert forward <= 2 * (m * hidden + 2 * m * c) + 2**20
