"""LayerNorm, two at once, its mean over tokens, the residual MLP: reference, interpreter, GPU.

The interpreter is chosen before Triton is imported, so its cases run in a process of their own:
``python -m pytest`` on this file with TRITON_INTERPRET=1, started by one test.
"""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastadapt.bench.harness import peak_memory, relative_error
from fastadapt.kernels import (
    BackendError,
    layer_norm,
    layer_norm_mean,
    layer_norm_mean_reference,
    layer_norm_reference,
    layer_norm_twice,
    layer_norm_twice_reference,
    residual_mlp,
    residual_mlp_reference,
)
from fastadapt.kernels.layer_norm.op import add_layer_norm, add_layer_norm_reference
from fastadapt.kernels.residual_mlp.op import linear_gelu
from tests.helpers.kernel_checks import (
    FIRST_CASE,
    INTERPRETING,
    RANDOM_CASES,
    beyond_pytorch,
    gpu,
    interpreted,
    output_and_gradients,
    run_interpreted,
    starts_interpreter,
)

NORM_NAMES = ("y", "x", "weight", "bias")
NAMES = {
    layer_norm: NORM_NAMES,
    layer_norm_twice: (*NORM_NAMES, "second_weight", "second_bias"),
    layer_norm_mean: NORM_NAMES,
    residual_mlp: (*NORM_NAMES, "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"),
}
REFERENCES = {
    layer_norm: layer_norm_reference,
    layer_norm_twice: layer_norm_twice_reference,
    layer_norm_mean: layer_norm_mean_reference,
    residual_mlp: residual_mlp_reference,
}
OPERATIONS = pytest.mark.parametrize("operation", list(REFERENCES))


def make(operation, shape, hidden, dtype, device="cpu", params=None):
    """Arguments of an operation and a gradient of its output."""

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=device) * scale).to(params or dtype)

    c = shape[-1]
    # Rows with a mean and a deviation of their own.
    x = torch.randn(shape, device=device) * 1.5 + torch.randn(*shape[:-1], 1, device=device)
    args = [x.to(dtype), 1 + normal(c, scale=0.5), normal(c)]
    if operation is layer_norm_twice:
        args += [1 + normal(c, scale=0.5), normal(c)]
    if operation is residual_mlp:
        args += [normal(hidden, c, scale=c**-0.5), normal(hidden)]
        args += [normal(c, hidden, scale=hidden**-0.5), normal(c)]
    y_shape = (*shape[:-2], c) if operation is layer_norm_mean else shape
    return args, torch.randn(y_shape, device=device).to(dtype)


def assert_as_exact_as_pytorch(operation, args, g, function=None, autocast=None):
    """Output and gradients within twice PyTorch's error in the same dtype, against fp64."""
    reference = REFERENCES[operation]

    def run(function):
        with torch.autocast(args[0].device.type, autocast, enabled=autocast is not None):
            return output_and_gradients(function, args, g)

    truth = output_and_gradients(reference, args, g, torch.float64)
    ours = run(partial(operation, backend="triton") if function is None else function)
    theirs = run(reference)
    wrong = beyond_pytorch(NAMES[operation], ours, theirs, truth, autocast, may_overflow=False)
    assert not wrong, ", ".join(wrong)


# The references


def test_gradcheck():
    for operation, reference in REFERENCES.items():
        args, _ = make(operation, (2, 3, 5), 4, torch.float64)
        assert torch.autograd.gradcheck(reference, [t.requires_grad_() for t in args])


def test_the_mlp_is_that_of_modules():
    (x, w, b, w1, b1, w2, b2), _ = make(residual_mlp, (2, 3, 5), 4, torch.float64)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-3).sqrt()
    h = (normal * w + b) @ w1.t() + b1
    gelu = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    y = residual_mlp_reference(x, w, b, w1, b1, w2, b2, 1e-3)
    torch.testing.assert_close(y, x + gelu @ w2.t() + b2)


@OPERATIONS
def test_auto_on_the_cpu_is_the_reference(operation):
    args, _ = make(operation, (2, 3, 8), 6, torch.float64)
    torch.testing.assert_close(operation(*args), REFERENCES[operation](*args), rtol=0, atol=0)


@pytest.mark.skipif(INTERPRETING, reason="there the kernels do run on the CPU")
@OPERATIONS
def test_triton_on_the_cpu_says_why_not(operation):
    args, _ = make(operation, (2, 3, 8), 6, torch.float32)
    with pytest.raises(BackendError, match="cpu"):
        operation(*args, backend="triton")


@OPERATIONS
def test_exported_and_compiled(operation):
    class Module(torch.nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.backend = backend

        def forward(self, *args):
            return operation(*args, backend=self.backend)

    args, g = make(operation, (2, 3, 8), 6, torch.float32)
    program = torch.export.export(Module("triton"), tuple(args))
    assert "fastadapt" not in str(program.graph) and "layer_norm" in str(program.graph)
    # The residual MLP is an operator there, which needs a GPU; LayerNorm an ordinary one.
    backend = "auto" if operation is residual_mlp else "triton"
    compiled = torch.compile(Module(backend), fullgraph=True, backend="aot_eager")
    assert_as_exact_as_pytorch(operation, args, g, compiled)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (7,), r"weight has shape \(7,\); expected \[C=8\] for x \(2, 3, 8\)"),
        ("bias", (8, 1), r"bias has shape \(8, 1\)"),
        ("second_weight", (7,), r"second_weight has shape \(7,\); expected \[C=8\]"),
        ("second_bias", (7,), r"second_bias has shape \(7,\); expected \[C=8\]"),
        ("fc1_weight", (6, 7), r"fc1_weight has shape \(6, 7\); expected \(6, 8\)"),
        ("fc1_bias", (5,), "fc1_bias has shape"),
        ("fc2_weight", (6, 8), r"fc2_weight has shape \(6, 8\); expected \(8, 6\)"),
        ("fc2_bias", (6,), "fc2_bias has shape"),
    ],
)
def test_shapes_that_do_not_fit(name, shape, message):
    for operation, names in NAMES.items():
        if name in names:
            args, _ = make(operation, (2, 3, 8), 6, torch.float32)
            args[names.index(name) - 1] = torch.zeros(shape)
            with pytest.raises(ValueError, match=message):
                operation(*args)


def test_the_mean_needs_tokens():
    args, _ = make(layer_norm_mean, (2, 3, 8), None, torch.float32)
    with pytest.raises(ValueError, match=r"x has shape \(8,\); expected \[\.\.\., N, C\]"):
        layer_norm_mean(torch.zeros(8), *args[1:3])


# The kernels in the interpreter. bf16 is wrong there, so fp16 and fp32.


@starts_interpreter
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@pytest.fixture
def few_programs(monkeypatch):
    """Programs that add up many rows each, of few rows."""
    from fastadapt.kernels.layer_norm import triton_kernels as layer_norm_triton
    from fastadapt.kernels.layer_norm.op import twice_triton_kernels as layer_norm_twice_triton

    for module in (layer_norm_triton, layer_norm_twice_triton):
        monkeypatch.setattr(module, "parts_for", lambda rows, *_, **__: min(rows, 5))


def strided(kind, shape, x, g, dtype, device="cpu"):
    """x and g again, of one kind of strides; g only if it is shaped as x."""
    if g.shape != x.shape:
        return strided(kind, shape, x, x, dtype, device)[0], g
    *leading, c = shape
    if kind == "sliced":  # as tokens without the class token
        x = torch.randn(*leading[:-1], leading[-1] + 1, c, device=device).to(dtype)[..., 1:, :]
    elif kind == "transposed":  # as a map
        x = torch.randn(*leading[:-1], c, leading[-1], device=device).to(dtype).mT
        g = torch.randn(*leading[:-1], c, leading[-1], device=device).to(dtype).mT
    elif kind == "expanded":  # as the gradient of a mean over tokens
        g = g[..., :1, :].expand(shape)
    elif kind == "columns":
        x = torch.randn(*leading, 2 * c, device=device).to(dtype)[..., ::2]
    return x, g


KINDS = ("plain", "sliced", "transposed", "expanded", "columns")


@interpreted
@OPERATIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [((2, 9, 64), 256), ((1, 1, 40), 96), ((150, 16), 17), ((3, 5, 2, 63), 65), ((7, 8), 1)],
)
def test_interpreted_shapes(operation, shape, hidden, dtype, poisoned_empty, few_programs):
    args, g = make(operation, shape, hidden, dtype)
    assert_as_exact_as_pytorch(operation, args, g)


@interpreted
@OPERATIONS
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_strides(operation, kind, poisoned_empty, few_programs):
    shape = (3, 7, 24)
    args, g = make(operation, shape, 33, torch.float16)
    args[0], g = strided(kind, shape, args[0], g, torch.float16)
    args[1] = torch.randn(24, 2).half()[:, 0]
    if operation is residual_mlp:
        args[3] = torch.randn(24, 33).half().t()
    assert_as_exact_as_pytorch(operation, args, g)


# What has no gradients: the sum before a LayerNorm, and a product with GELU behind it.


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
@pytest.mark.parametrize("shape", [(2, 9, 64), (150, 16), (3, 5, 2, 63)])
def test_interpreted_without_gradients(shape, dtype, poisoned_empty):
    for stream in (torch.float32, dtype):
        assert_sum_and_norm(shape, stream, dtype)
    assert_product_with_gelu(shape, 33, dtype)


@pytest.mark.skipif(INTERPRETING, reason="there the kernels do run on the CPU")
def test_without_gradients_on_the_cpu_the_references_run():
    (x, weight, bias, fc1_weight, fc1_bias, *_), branch = make(
        residual_mlp, (2, 3, 8), 6, torch.float32
    )
    args = (x, branch, weight, bias, 1e-6, torch.bfloat16)
    for ours, theirs in zip(add_layer_norm(*args), add_layer_norm_reference(*args), strict=True):
        assert torch.equal(ours, theirs)
    expected = F.gelu(F.linear(x, fc1_weight, fc1_bias))
    assert torch.equal(linear_gelu(x, fc1_weight, fc1_bias), expected)
    with pytest.raises(ValueError, match=r"branch has shape \(2, 3, 7\); expected \(2, 3, 8\)"):
        add_layer_norm(x, branch[..., :7], *args[2:])
    with pytest.raises(BackendError, match="cpu"):
        linear_gelu(x, fc1_weight, fc1_bias, backend="triton")


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "hidden"), [((128, 196, 768), 3072), ((3, 70, 1000), 65), ((40, 63), 1)]
)
def test_gpu_without_gradients(shape, hidden, dtype, poisoned_empty):
    for stream in (torch.float32, dtype):
        assert_sum_and_norm(shape, stream, dtype, "cuda")
    assert_product_with_gelu(shape, hidden, dtype, "cuda")
    (x, weight, bias), branch = make(layer_norm, shape, None, dtype, "cuda")
    with pytest.raises(BackendError, match="gradients are on"):
        add_layer_norm(x, branch, weight, bias, 1e-6, dtype, backend="triton")


def assert_alone_as_together(operation, args, g):
    together = output_and_gradients(partial(operation, backend="triton"), args, g)
    for asked in range(len(args)):
        leaves = [t.detach().clone().requires_grad_(i == asked) for i, t in enumerate(args)]
        y = operation(*leaves, backend="triton")
        assert torch.equal(y, together[0])
        (alone,) = torch.autograd.grad(y, leaves[asked], g)
        assert torch.equal(alone, together[1 + asked]), NAMES[operation][1 + asked]
    with torch.no_grad():
        assert torch.equal(operation(*args, backend="triton"), together[0])


@interpreted
@OPERATIONS
def test_interpreted_gradients_asked_for_singly(operation, poisoned_empty, few_programs):
    assert_alone_as_together(operation, *make(operation, (2, 9, 24), 40, torch.float16))


def assert_retained_graph_gives_the_same(operation, args, g):
    leaves = [t.requires_grad_() for t in args]
    y = operation(*leaves, backend="triton")
    first = torch.autograd.grad(y, leaves, g, retain_graph=True)
    for before, again in zip(first, torch.autograd.grad(y, leaves, g), strict=True):
        assert torch.equal(before, again)
    y = operation(*leaves, backend="triton")
    (dx,) = torch.autograd.grad(y, leaves[0], g.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|twice"):
        dx.sum().backward()


@interpreted
@OPERATIONS
def test_interpreted_retained_graph_and_second_derivative(operation):
    assert_retained_graph_gives_the_same(operation, *make(operation, (2, 9, 24), 40, torch.float16))


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


# The kernels on the GPU


@gpu
@OPERATIONS
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
def test_gpu_shapes(operation, shape, hidden, dtype):
    args, g = make(operation, shape, hidden, dtype, "cuda")
    assert_as_exact_as_pytorch(operation, args, g)


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
    from fastadapt.kernels.residual_mlp import triton_kernels as kernels

    args, g = make(residual_mlp, shape, hidden, dtype, "cuda")
    rows, fc1_weight, fc1_bias, fc2_weight = args[0].flatten(0, -2), *args[3:6]
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert kernels.fuses(rows, fc1_weight) == hopper
    assert_as_exact_as_pytorch(residual_mlp, args, g)
    if hopper:
        out, slope = kernels.product_gelu(rows, fc1_weight, fc1_bias, save=True)
        assert torch.equal(kernels.product_gelu(rows, fc1_weight, fc1_bias, save=False)[0], out)
        backward = partial(kernels.product_gelu_backward, g.flatten(0, -2), fc2_weight, slope)
        assert torch.equal(backward(sums=False)[0], backward(sums=True)[0])


@gpu
@OPERATIONS
def test_gpu_random(operation):
    """FASTADAPT_RANDOM_CASES calls with random sizes, dtypes, strides and autocast."""
    wrong = []
    for case in range(FIRST_CASE, FIRST_CASE + RANDOM_CASES):
        torch.manual_seed(case)
        choose = random.Random(case)
        dtype = choose.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
        c = choose.choice([8, 15, 16, 63, 96, 192, 384, 768, 1000, 1024, 1280, 2048, 4096])
        hidden = choose.choice([1, 33, 96, 384, 1000, 2 * c, 3072, 4 * c])
        n = choose.choice([1, 3, 17, 49, 100, 196, 197, 256, 777])
        b = choose.randint(1, max(1, (20_000 if case % 4 == 0 else 2_000) // n))
        kind = choose.choice(KINDS)
        autocast = choose.choice([None, None, torch.bfloat16, torch.float16])
        params = torch.float32 if autocast else dtype
        if autocast and operation is residual_mlp:
            dtype = autocast  # in fp32 it is the reference's
        args, g = make(operation, (b, n, c), hidden, dtype, "cuda", params)
        args[0], g = strided(kind, (b, n, c), args[0], g, dtype, "cuda")
        try:
            assert_as_exact_as_pytorch(operation, args, g, autocast=autocast)
        except AssertionError as error:
            wrong.append(f"case {case}: {b, n, c, hidden, dtype, kind, autocast}: {error}")
            print(wrong[-1], flush=True)
    assert not wrong, "\n".join(wrong)


@gpu
@OPERATIONS
@pytest.mark.parametrize("c", [200, 256, 768])
def test_gpu_output_is_the_same_without_gradients(operation, c):
    args, g = make(operation, (3, 3001, c), 520, torch.bfloat16, "cuda")
    with torch.no_grad():
        y = operation(*args, backend="triton")
    trained = output_and_gradients(partial(operation, backend="triton"), args, g)[0]
    assert torch.equal(y, trained)


@gpu
@OPERATIONS
def test_gpu_gradients_asked_for_singly(operation):
    assert_alone_as_together(operation, *make(operation, (4, 49, 96), 384, torch.bfloat16, "cuda"))


@gpu
@OPERATIONS
def test_gpu_retained_graph_and_second_derivative(operation):
    assert_retained_graph_gives_the_same(
        operation, *make(operation, (4, 49, 96), 384, torch.bfloat16, "cuda")
    )


@gpu
def test_gpu_opcheck():
    args, _ = make(residual_mlp, (4, 49, 96), 384, torch.bfloat16, "cuda")
    args = [t.requires_grad_() for t in args]
    torch.library.opcheck(torch.ops.fastadapt.residual_mlp.default, (*args, 1e-5, True))


@gpu
@OPERATIONS
def test_gpu_compiles_whole(operation):
    args, g = make(operation, (8, 100, 384), 1536, torch.bfloat16, "cuda")
    compiled = torch.compile(lambda *a: operation(*a), fullgraph=True)
    assert_as_exact_as_pytorch(operation, args, g, compiled)


@gpu
@OPERATIONS
def test_gpu_checkpoint_and_cuda_graph(operation):
    from torch.utils.checkpoint import checkpoint

    args, g = make(operation, (32, 196, 768), 3072, torch.bfloat16, "cuda")
    function = partial(operation, backend="triton")
    assert_as_exact_as_pytorch(
        operation, args, g, lambda *a: checkpoint(function, *a, use_reentrant=False)
    )
    expected = output_and_gradients(function, args, g)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        output_and_gradients(function, args, g)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = output_and_gradients(function, args, g)
    for _ in range(2):
        for result in results:
            result.zero_()
        graph.replay()
        for name, result, want in zip(NAMES[operation], results, expected, strict=True):
            assert torch.equal(result, want), name


@gpu
@OPERATIONS
def test_gpu_is_deterministic(operation, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        args, g = make(operation, (64, 196, 768), 3072, torch.bfloat16, "cuda")
        function = partial(operation, backend="triton")
        first = output_and_gradients(function, args, g)
        for again, before in zip(output_and_gradients(function, args, g), first, strict=True):
            assert torch.equal(again, before)
    finally:
        torch.use_deterministic_algorithms(False)


@gpu
def test_gpu_empty_and_uncovered():
    for operation in REFERENCES:
        args, _ = make(operation, (1, 5, 32), 64, torch.bfloat16, "cuda")
        args[0] = args[0][:0]
        expected = (0, 32) if operation is layer_norm_mean else (0, 5, 32)
        assert operation(*args).shape == expected
        with pytest.raises(BackendError, match="empty"):
            operation(*args, backend="triton")
        for width in (7, 8193):
            args, _ = make(operation, (2, width), 4, torch.bfloat16, "cuda")
            with pytest.raises(BackendError, match=f"{width} channels"):
                operation(*args, backend="triton")
        torch.testing.assert_close(operation(*args), REFERENCES[operation](*args))
    args, _ = make(residual_mlp, (2, 5, 32), 64, torch.float32, "cuda")
    with (
        torch.autocast("cuda", torch.bfloat16),
        pytest.raises(BackendError, match=r"float32 under autocast to torch\.bfloat16"),
    ):
        residual_mlp(*args, backend="triton")


@gpu
@pytest.mark.parametrize(
    ("operation", "c", "hidden"), [(layer_norm, 768, 1), (residual_mlp, 64, 4096)]
)
def test_gpu_more_than_two_to_the_31_elements(operation, c, hidden):
    rows, few = 2**31 // max(c, hidden) + 5000, 1000
    args, _ = make(operation, (few, c), hidden, torch.bfloat16, "cuda")
    x, g = (torch.randn(few, c, device="cuda").bfloat16() for _ in range(2))
    times = -(-rows // few)
    large = [t.repeat(times, 1) for t in (x, g)]
    y, dx, *_ = output_and_gradients(operation, [large[0], *args[1:]], large[1])
    want_y, want_dx, *_ = output_and_gradients(operation, [x, *args[1:]], g)
    for got, want in ((y, want_y), (dx, want_dx)):
        for part in (got[:few], got[-few:], got[times // 2 * few :][:few]):
            torch.testing.assert_close(part, want, rtol=2e-2, atol=2e-2)


@gpu
def test_gpu_memory():
    """As the file's docstring counts it: three times the hidden numbers, and rows of x's width."""
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
