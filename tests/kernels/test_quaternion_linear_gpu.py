"""Quaternion linear layers on the GPU, by the same standard as in the interpreter."""

from __future__ import annotations

import pytest
import torch

from fastadapt.bench.harness import relative_error
from fastadapt.kernels import quaternion_linear, quaternion_linear_reference
from tests.helpers.kernel_checks import FIRST_CASE, RANDOM_CASES, gpu
from tests.helpers.quaternion_calls import (
    call,
    errors_beyond_pytorch,
    make,
    output_and_gradients,
    random_case,
    with_triton,
)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("zero_half", [False, True])
@pytest.mark.parametrize(
    ("m", "i", "o", "groups", "form"),
    [
        (8, 256, 128, None, "hamilton"),
        (8, 256, 192, 8, "hamilton"),
        (64, 256, 192, None, "hamilton"),
        (16, 1024, 1024, None, "hamilton"),
        (65, 1024, 1024, None, "hamilton"),
        (4096, 256, 256, None, "hamilton"),
        (25088, 256, 256, None, "hamilton"),
        (8192, 1024, 1024, None, "hamilton"),
        (4000, 192, 64, None, "hamilton"),  # on Hopper, tiles that are not whole
        (513, 64, 320, None, "hamilton"),
        (1000, 63, 60, None, "hamilton"),
        (1, 1, 1, None, "hamilton"),
        (8, 256, 192, 8, "rotation"),
        (64, 256, 192, None, "scaled rotation"),
        (4096, 256, 256, None, "scaled rotation"),
        (1000, 63, 60, None, "rotation"),
    ],
)
def test_gpu(m, i, o, groups, form, zero_half, dtype, poisoned_empty):
    if dtype == torch.float32 and m * i * o > 2**31:
        pytest.skip("minutes of fp64 for nothing new")
    args, g, kwargs = make(m, i, o, dtype, "cuda", groups=groups, form=form, zero_half=zero_half)
    assert not errors_beyond_pytorch(args, g, kwargs)


@gpu
@pytest.mark.parametrize("m", [8, 4096])
def test_gpu_dtypes_in_turn(m):
    """What was compiled for one dtype is not used for another of the same sizes."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
        assert not errors_beyond_pytorch(*make(m, 64, 128, dtype, "cuda"))


@gpu
def test_gpu_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for form in ("hamilton", "scaled rotation"):
            torch.backends.cuda.matmul.allow_tf32 = True
            args, g, kwargs = make(100, 256, 192, torch.float32, "cuda", form=form)
            assert not errors_beyond_pytorch(args, g, kwargs)
            y = call(with_triton, args, kwargs)
            torch.backends.cuda.matmul.allow_tf32 = False
            assert not torch.equal(call(with_triton, args, kwargs), y)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@gpu
def test_gpu_random():
    """FASTADAPT_RANDOM_CASES calls; all failures of the range are reported at once."""
    failures = []
    for case in range(FIRST_CASE, FIRST_CASE + RANDOM_CASES):
        try:
            found = random_case(case)
        except Exception as error:
            found = [f"case {case}: {type(error).__name__}: {error}"]
        failures += found
        print(f"{case} done", *found, sep="\n", flush=True)  # for a campaign that is cut off
        if any("CUDA error" in line for line in found):
            break  # nothing after it can succeed in this process
    assert not failures, "\n".join(failures)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [8, 1024])
@pytest.mark.parametrize("form", ["hamilton", "scaled rotation"])
def test_gpu_autocast_with_fp32_parameters(form, m, dtype):
    args, g, kwargs = make(m, 256, 192, torch.float32, "cuda", form=form)

    def run(function):
        with torch.autocast("cuda", dtype):
            return output_and_gradients(function, args, g, kwargs)

    truth = output_and_gradients(quaternion_linear_reference, args, g, kwargs, torch.float64)
    reference, ours = run(quaternion_linear_reference), run(with_triton)
    for mine, theirs, exact in zip(ours, reference, truth, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, exact) <= 2 * relative_error(theirs, exact) + 1e-7


@gpu
@pytest.mark.parametrize("m", [8, 1024])
def test_gpu_opcheck(m):
    for form in ("hamilton", "scaled rotation"):
        args, _, kwargs = make(m, 64, 64, torch.bfloat16, "cuda", form=form)
        args = [None if t is None else t.requires_grad_() for t in args]
        operator = torch.ops.fastadapt.quaternion_linear.default
        torch.library.opcheck(operator, (*args, *kwargs.values()))


@gpu
@pytest.mark.parametrize("m", [8, 1024])
def test_gpu_compiles_whole(m, monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")
    args, g, kwargs = make(m, 256, 192, torch.bfloat16, "cuda")
    compiled = torch.compile(lambda *a, **k: quaternion_linear(*a, **k) * 2, fullgraph=True)
    assert not errors_beyond_pytorch(args, g, kwargs, lambda *a, **k: compiled(*a, **k) / 2)


@gpu
@pytest.mark.parametrize("m", [8, 25088])
def test_gpu_is_deterministic(m):
    args, g, kwargs = make(m, 256, 256, torch.bfloat16, "cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first = output_and_gradients(with_triton, args, g, kwargs)
        again = output_and_gradients(with_triton, args, g, kwargs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@gpu
@pytest.mark.parametrize("m", [8, 1024])
def test_gpu_checkpoint_and_cuda_graph(m, monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")
    from torch.utils.checkpoint import checkpoint

    args, g, kwargs = make(m, 256, 192, torch.bfloat16, "cuda")
    assert not errors_beyond_pytorch(
        args,
        g,
        kwargs,
        lambda *a, **k: checkpoint(quaternion_linear, *a, use_reentrant=False, **k),
    )
    leaves = [None if t is None else t.requires_grad_() for t in args]
    asked = [t for t in leaves if t is not None]

    def step():
        y = call(quaternion_linear, leaves, kwargs)
        return [y, *torch.autograd.grad(y, asked, g)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for t in captured:
            t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@gpu
@pytest.mark.parametrize("m", [8, 1024])
def test_gpu_second_device(m):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    args, g, kwargs = make(m, 64, 64, torch.bfloat16, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert not errors_beyond_pytorch(args, g, kwargs)


@gpu
def test_gpu_more_than_two_to_the_31_elements():
    m, i, o = 1_100_000, 500, 64  # x has 2.2e9 elements, 64 outputs and 500 inputs: plain kernels
    for i in (500, 512):  # and those for Hopper
        args, g, kwargs = make(64, i, o, torch.bfloat16, "cuda")
        rows = args[0]
        x = torch.empty(m, 4 * i, device="cuda", dtype=torch.bfloat16)
        x[:], x[-64:] = rows[0], rows
        args[0] = rows
        want = call(with_triton, args, kwargs)
        got = call(with_triton, [x, *args[1:]], kwargs)
        torch.testing.assert_close(got[-64:], want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got[m // 2], want[0], rtol=2e-2, atol=2e-2)
        x.requires_grad_()
        dy = torch.zeros(m, 4 * o, device="cuda", dtype=torch.bfloat16)
        dy[-64:] = g
        leaves = [x, *(t.requires_grad_() for t in args[1:6]), None]
        grads = torch.autograd.grad(call(with_triton, leaves, kwargs), leaves[:6], dy)
        exact = output_and_gradients(quaternion_linear_reference, args, g, kwargs, torch.float64)
        for mine, truth in zip((grads[0][-64:], *grads[1:]), exact[1:], strict=True):
            assert relative_error(mine, truth) < 1e-2
        del x, dy, grads, got, leaves
