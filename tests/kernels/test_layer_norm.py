"""LayerNorm, with an addition, twice in a row, with the mean: reference, interpreter, GPU.

The interpreter is chosen before Triton is imported, so its cases run in a process of their own:
``python -m pytest`` on this file with TRITON_INTERPRET=1, started by ``test_interpreter.py``.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastadapt.bench.harness import relative_error
from fastadapt.kernels import (
    BackendError,
    layer_norm,
    layer_norm_mean,
    layer_norm_reference,
    layer_norm_twice,
)
from fastadapt.kernels.layer_norm.op import add_layer_norm
from fastadapt.kernels.layer_norm.reference import add_layer_norm_reference
from tests.helpers import row_operations
from tests.helpers.kernel_checks import (
    INTERPRETING,
    gpu,
    interpreted,
    output_and_gradients,
)
from tests.helpers.row_operations import KINDS, NAMES, REFERENCES, make

NORMS = (layer_norm, layer_norm_twice, layer_norm_mean)
OPERATIONS = pytest.mark.parametrize("operation", NORMS)


# The references


@OPERATIONS
def test_gradcheck(operation):
    args, _ = make(operation, (2, 3, 5), None, torch.float64)
    assert torch.autograd.gradcheck(REFERENCES[operation], [t.requires_grad_() for t in args])


@OPERATIONS
def test_auto_on_the_cpu_is_the_reference(operation):
    args, _ = make(operation, (2, 3, 8), None, torch.float64)
    torch.testing.assert_close(operation(*args), REFERENCES[operation](*args), rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETING, reason="there the kernels do run on the CPU")
@OPERATIONS
def test_triton_on_the_cpu_says_why_not(operation):
    args, _ = make(operation, (2, 3, 8), None, torch.float32)
    with pytest.raises(BackendError, match="cpu"):
        operation(*args, backend="triton")


@OPERATIONS
def test_exported_and_compiled(operation):
    row_operations.assert_exported_and_compiled(operation)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (7,), r"weight has shape \(7,\); expected \[C=8\] for x \(2, 3, 8\)"),
        ("bias", (8, 1), r"bias has shape \(8, 1\)"),
        ("second_weight", (7,), r"second_weight has shape \(7,\); expected \[C=8\]"),
        ("second_bias", (7,), r"second_bias has shape \(7,\); expected \[C=8\]"),
    ],
)
def test_shapes_that_do_not_fit(name, shape, message):
    for operation in NORMS:
        if name in NAMES[operation]:
            row_operations.assert_shape_is_refused(operation, name, shape, message)


def test_the_mean_needs_tokens():
    args, _ = make(layer_norm_mean, (2, 3, 8), None, torch.float32)
    with pytest.raises(ValueError, match=r"x has shape \(8,\); expected \[\.\.\., N, C\]"):
        layer_norm_mean(torch.zeros(8), *args[1:3])


# The kernels in the interpreter. bf16 is wrong there, so fp16 and fp32.


@interpreted
@OPERATIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 9, 64), (1, 1, 40), (62, 16), (3, 5, 2, 63), (7, 8)])
def test_interpreted_shapes(operation, shape, dtype, poisoned_empty, few_programs):
    args, g = make(operation, shape, None, dtype)
    row_operations.assert_as_exact_as_pytorch(operation, args, g)


@interpreted
@OPERATIONS
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_strides(operation, kind, poisoned_empty, few_programs):
    row_operations.assert_strides(operation, kind)


@interpreted
@OPERATIONS
def test_interpreted_gradients_asked_for_singly(operation, poisoned_empty, few_programs):
    args, g = make(operation, (2, 9, 24), None, torch.float16)
    row_operations.assert_alone_as_together(operation, args, g)


@interpreted
@OPERATIONS
def test_interpreted_retained_graph_and_second_derivative(operation):
    args, g = make(operation, (2, 9, 24), None, torch.float16)
    row_operations.assert_retained_graph_gives_the_same(operation, args, g)


@interpreted
@pytest.mark.parametrize("operation", [layer_norm, layer_norm_twice])
def test_interpreted_output_in_another_dtype(operation):
    args, g = make(operation, (2, 9, 24), None, torch.float32)
    half = {"dtype": torch.float16}
    ours = output_and_gradients(partial(operation, **half), args, g.half())
    want = output_and_gradients(partial(REFERENCES[operation], **half), args, g.half())
    for mine, theirs in zip(ours, want, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


# Addition and LayerNorm, which has no gradient


@torch.no_grad()
def assert_sum_and_norm(shape, stream, dtype, device="cpu"):
    (x, weight, bias), branch = make(layer_norm, shape, None, torch.float32, device)
    x, branch = x.to(stream), branch.to(dtype)
    if len(shape) == 3:  # without the first token
        x = torch.cat([x[:, :1], x], 1)[:, 1:]
    total, normal = add_layer_norm(x, branch, weight, bias, 1e-6, dtype, backend="triton")
    assert (total.dtype, normal.dtype) == (stream, dtype)
    exact = x.double() + branch.double()
    assert relative_error(total, exact) <= torch.finfo(stream).eps
    exact = layer_norm_reference(exact, weight.double(), bias.double(), 1e-6)
    theirs = add_layer_norm_reference(x, branch, weight, bias, 1e-6, dtype)[1]
    assert relative_error(normal, exact) <= 2 * relative_error(theirs, exact) + 1e-7


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 9, 64), (62, 16), (3, 5, 2, 63)])
def test_interpreted_addition(shape, dtype, poisoned_empty):
    for stream in (torch.float32, dtype):
        assert_sum_and_norm(shape, stream, dtype)


@pytest.mark.skipif(INTERPRETING, reason="there the kernels do run on the CPU")
def test_addition_on_the_cpu_is_the_reference():
    (x, weight, bias), branch = make(layer_norm, (2, 3, 8), None, torch.float32)
    args = (x, branch, weight, bias, 1e-6, torch.bfloat16)
    for ours, theirs in zip(add_layer_norm(*args), add_layer_norm_reference(*args), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"branch has shape \(2, 3, 7\); expected \(2, 3, 8\)"):
        add_layer_norm(x, branch[..., :7], *args[2:])


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 196, 768), (3, 70, 1000), (40, 63)])
def test_gpu_addition(shape, dtype, poisoned_empty):
    for stream in (torch.float32, dtype):
        assert_sum_and_norm(shape, stream, dtype, "cuda")
    (x, weight, bias), branch = make(layer_norm, shape, None, dtype, "cuda")
    with pytest.raises(BackendError, match="gradients are on"):
        add_layer_norm(x, branch, weight, bias, 1e-6, dtype, backend="triton")


# The kernels on the GPU


@gpu
@OPERATIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [
        (128, 196, 768),
        (64, 256, 1024),
        (256, 49, 1280),
        (1, 196, 768),
        (3, 63, 1000),
        (40, 197, 96),
        (5, 33, 4096),
        (4, 8192),
        (1, 1, 768),
        (2, 3, 5, 100),
    ],
)
def test_gpu_shapes(operation, shape, dtype):
    args, g = make(operation, shape, None, dtype, "cuda")
    row_operations.assert_as_exact_as_pytorch(operation, args, g)


@gpu
@OPERATIONS
def test_gpu_random(operation):
    """FASTADAPT_RANDOM_CASES calls with random sizes, dtypes, strides and autocast."""
    row_operations.assert_random_cases(operation)


@gpu
@OPERATIONS
@pytest.mark.parametrize("c", [200, 256, 768])
def test_gpu_output_is_the_same_without_gradients(operation, c):
    row_operations.assert_output_is_the_same_without_gradients(operation, c)


@gpu
@OPERATIONS
def test_gpu_gradients_asked_for_singly(operation):
    args, g = make(operation, (4, 49, 96), None, torch.bfloat16, "cuda")
    row_operations.assert_alone_as_together(operation, args, g)


@gpu
@OPERATIONS
def test_gpu_retained_graph_and_second_derivative(operation):
    args, g = make(operation, (4, 49, 96), None, torch.bfloat16, "cuda")
    row_operations.assert_retained_graph_gives_the_same(operation, args, g)


@gpu
@OPERATIONS
def test_gpu_compiles_whole(operation):
    args, g = make(operation, (8, 100, 384), None, torch.bfloat16, "cuda")
    compiled = torch.compile(lambda *a: operation(*a), fullgraph=True)
    row_operations.assert_as_exact_as_pytorch(operation, args, g, compiled)


@gpu
@OPERATIONS
def test_gpu_checkpoint_and_cuda_graph(operation):
    row_operations.assert_checkpoint_and_cuda_graph(operation)


@gpu
@OPERATIONS
def test_gpu_is_deterministic(operation, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    row_operations.assert_deterministic(operation)


@gpu
@OPERATIONS
def test_gpu_empty_and_uncovered(operation):
    row_operations.assert_empty_and_uncovered(operation)


@gpu
def test_gpu_more_than_two_to_the_31_elements():
    row_operations.assert_more_than_two_to_the_31_elements(layer_norm, 768, 1)
