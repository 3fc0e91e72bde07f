"""Arguments and checks that the tests of the operations on rows share: norms, the residual MLP."""

from __future__ import annotations

import random
import statistics
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastadapt.bench.harness import relative_error
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
from tests.helpers.kernel_checks import (
    FEW,
    FIRST_CASE,
    RANDOM_CASES,
    beyond_pytorch,
    few_values,
    output_and_gradients,
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
    wrong = errors_beyond_pytorch(operation, args, g, function, autocast)
    assert not wrong, ", ".join(wrong)


def errors_beyond_pytorch(operation, args, g, function=None, autocast=None):
    """Results with more than twice PyTorch's error in the same dtype, against fp64.

    Twice PyTorch's error is a limit where a result has many numbers that are rounded independently:
    the norms of both errors are then averages. The gradient of the residual MLP's LayerNorm's bias
    has C numbers, but all of them are made of the H sums over rows of dh [M, H]:

        dln_bias[c] = sum over h of fc1_weight[h, c] · (sum over rows m of dh[m, h])

    With one hidden unit it is a single number, times a vector that both have alike, and either is
    now and then several times as lucky as the other: simulated with 833 rows in fp16, ours is
    beyond twice PyTorch's error in 12 % of the draws and PyTorch beyond twice ours in 7 %, while
    the root mean squares differ by a tenth (the slope of GELU is rounded to fp16 here, and not
    there). So what is made of fewer than 1000 independent numbers may have 2 eps more, as what has
    few numbers may, in proportion to the terms of the sums (:func:`cancellation`); many draws of
    the same call are compared by their medians, without any slack (:func:`median_errors`).
    """
    reference = REFERENCES[operation]

    def run(function):
        with torch.autocast(args[0].device.type, autocast, enabled=autocast is not None):
            return output_and_gradients(function, args, g)

    few, cancels = few_values, None
    if operation is residual_mlp:
        few = partial(few_independent_values, args)
        if args[3].shape[0] < FEW:
            cancels = cancellation(args, g)
    truth = output_and_gradients(reference, args, g, torch.float64)
    ours = run(partial(operation, backend="triton") if function is None else function)
    return beyond_pytorch(
        NAMES[operation],
        ours,
        run(reference),
        truth,
        autocast,
        few=few,
        cancellation=cancels,
        may_overflow=False,
    )


def few_independent_values(args, name, exact):
    """Whether a gradient of the residual MLP is made of few numbers that are rounded."""
    rows, hidden = args[0].numel() // args[0].shape[-1], args[3].shape[0]
    values = {
        "bias": hidden,  # sums of dh over rows
        "weight": rows * hidden,  # dh itself
        "fc1_weight": rows * hidden,
        "fc2_weight": rows * hidden,  # GELU
    }
    return min(exact.numel(), values.get(name, FEW)) < FEW


def cancellation(args, g):
    """Norms of the terms of both sums of dh over rows, by the norms of the sums; in fp64."""
    x, weight, bias, *others = [t.detach().double() for t in args]
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = others
    # A bias for each row: its gradient is the row's term.
    bias = bias.expand(x.shape).clone().requires_grad_()
    fc1_bias = fc1_bias.expand(*x.shape[:-1], -1).clone().requires_grad_()
    normal = F.layer_norm(x, weight.shape, weight) + bias
    y = F.linear(F.gelu(F.linear(normal, fc1_weight) + fc1_bias), fc2_weight, fc2_bias)
    terms = torch.autograd.grad(y, (bias, fc1_bias), g.double())
    return {
        name: float(t.norm() / t.flatten(0, -2).sum(0).norm())
        for name, t in zip(("bias", "fc1_bias"), terms, strict=True)
    }


def median_errors(operation, draw, count):
    """Medians of our and of PyTorch's errors over many draws of a call, by result.

    Args:
        operation: to call.
        draw: makes arguments and a gradient; called ``count`` times, each with another seed.
        count: of the draws.

    Returns:
        Ours and PyTorch's, by the result's name.
    """
    reference = REFERENCES[operation]
    errors = {name: ([], []) for name in NAMES[operation]}
    for seed in range(count):
        torch.manual_seed(seed)
        args, g = draw()
        truth = output_and_gradients(reference, args, g, torch.float64)
        functions = (partial(operation, backend="triton"), reference)
        for which, function in enumerate(functions):
            results = output_and_gradients(function, args, g)
            for name, result, exact in zip(NAMES[operation], results, truth, strict=True):
                errors[name][which].append(relative_error(result, exact))
    return {
        name: (statistics.median(ours), statistics.median(theirs))
        for name, (ours, theirs) in errors.items()
    }


KINDS = ("plain", "sliced", "transposed", "expanded", "columns")


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


def random_case(operation, case, device="cuda", *, small=False):
    """One call with random sizes, dtypes, strides and autocast; returns what is wrong with it.

    Args:
        operation: to call.
        case: the seed.
        device: where.
        small: few numbers; no bf16, whose products are wrong in the interpreter; no autocast,
            whose policy for norms is another on the CPU.
    """
    torch.manual_seed(case)
    choose = random.Random(case)
    dtype = choose.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    c = choose.choice([8, 15, 16, 63, 96, 192, 384, 768, 1000, 1024, 1280, 2048, 4096])
    hidden = choose.choice([1, 33, 96, 384, 1000, 2 * c, 3072, 4 * c])
    n = choose.choice([1, 3, 17, 49, 100, 196, 197, 256, 777])
    b = choose.randint(1, max(1, (20_000 if case % 4 == 0 else 2_000) // n))
    kind = choose.choice(KINDS)
    autocast = choose.choice([None, None, torch.bfloat16, torch.float16])
    if small:
        dtype, autocast = torch.float16 if dtype is torch.bfloat16 else dtype, None
        c, hidden, n, b = min(c, 200), min(hidden, 130), min(n, 20), min(b, 3)
    widest = hidden if operation is residual_mlp else c
    b = max(1, min(b, 2**26 // (n * widest)))  # a tensor in fp64: 512 MiB
    params = torch.float32 if autocast else dtype
    if autocast and operation is residual_mlp:
        dtype = autocast  # in fp32 it is the reference's
    args, g = make(operation, (b, n, c), hidden, dtype, device, params)
    args[0], g = strided(kind, (b, n, c), args[0], g, dtype, device)
    found = errors_beyond_pytorch(operation, args, g, autocast=autocast)
    if found:
        found.insert(0, f"case {case}: {b, n, c, hidden, dtype, kind, autocast}")
    return found


def assert_random_cases(operation):
    """FASTADAPT_RANDOM_CASES random calls from FASTADAPT_FIRST_CASE on; all failures at once."""
    wrong = []
    for case in range(FIRST_CASE, FIRST_CASE + RANDOM_CASES):
        found = random_case(operation, case)
        if found:
            wrong.append(", ".join(found))
            print(wrong[-1], flush=True)
    assert not wrong, "\n".join(wrong)


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


def assert_exported_and_compiled(operation):
    """Exported programs hold ordinary operators; torch.compile takes the operation whole."""

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


def assert_shape_is_refused(operation, name, shape, message):
    """One argument of another shape is named, with what was expected."""
    args, _ = make(operation, (2, 3, 8), 6, torch.float32)
    args[NAMES[operation].index(name) - 1] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        operation(*args)


def assert_strides(operation, kind):
    """Any strides of x, its gradient and the first parameters give the same results."""
    shape = (3, 7, 24)
    args, g = make(operation, shape, 33, torch.float16)
    args[0], g = strided(kind, shape, args[0], g, torch.float16)
    args[1] = torch.randn(24, 2).half()[:, 0]
    if operation is residual_mlp:
        args[3] = torch.randn(24, 33).half().t()
    assert_as_exact_as_pytorch(operation, args, g)


def assert_output_is_the_same_without_gradients(operation, c):
    args, g = make(operation, (3, 3001, c), 520, torch.bfloat16, "cuda")
    with torch.no_grad():
        y = operation(*args, backend="triton")
    trained = output_and_gradients(partial(operation, backend="triton"), args, g)[0]
    assert torch.equal(y, trained)


def assert_checkpoint_and_cuda_graph(operation):
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


def assert_deterministic(operation):
    torch.use_deterministic_algorithms(True)
    try:
        args, g = make(operation, (64, 196, 768), 3072, torch.bfloat16, "cuda")
        function = partial(operation, backend="triton")
        first = output_and_gradients(function, args, g)
        for again, before in zip(output_and_gradients(function, args, g), first, strict=True):
            assert torch.equal(again, before)
    finally:
        torch.use_deterministic_algorithms(False)


def assert_empty_and_uncovered(operation):
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


def assert_more_than_two_to_the_31_elements(operation, c, hidden):
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
