"""Quaternion layers: reference, module, kernels in the interpreter, kernels on the GPU.

The interpreter is chosen before Triton is imported, so its cases run in a process of their own:
``python -m pytest`` on this file with TRITON_INTERPRET=1, started by one test.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt.bench.harness import relative_error
from fastadapt.kernels import (
    BackendError,
    quaternion_linear,
    quaternion_linear_reference,
    quaternion_matrix,
)
from tests.helpers import kernel_checks
from tests.helpers.kernel_checks import (
    FIRST_CASE,
    INTERPRETING,
    RANDOM_CASES,
    beyond_pytorch,
    gpu,
    interpreted,
    run_interpreted,
    starts_interpreter,
)
from tests.helpers.upstream import hamilton, rotation

NAMES = ("y", "x", "weight_r", "weight_i", "weight_j", "weight_k", "bias", "scale")


def weights(i=3, o=5, dtype=torch.float64):
    return [torch.randn(i, o, dtype=dtype) for _ in range(4)]


def test_hamilton_equals_the_componentwise_product():
    w, x, b = weights(), torch.randn(2, 7, 12, dtype=torch.float64), torch.randn(20).double()
    torch.testing.assert_close(quaternion_linear(x, *w, b), hamilton(x, *w) + b)


@pytest.mark.parametrize("scaled", [False, True])
def test_rotation_equals_the_componentwise_product(scaled):
    w, x = weights(), torch.randn(7, 12, dtype=torch.float64)
    scale = torch.randn(3, 5, dtype=torch.float64) if scaled else None
    y = quaternion_linear(x, *w, rotation=True, scale=scale)
    torch.testing.assert_close(y, rotation(x, *w, scale))


def test_rotation_is_a_rotation():
    """One quaternion turned by a unit quaternion keeps its length: the 1e-4 aside."""
    w = [torch.full((1, 1), v, dtype=torch.float64) for v in (10.0, -20.0, 5.0, 30.0)]
    x = torch.tensor([[0.0, 1.0, -2.0, 3.0]], dtype=torch.float64)
    y = quaternion_linear(x, *w, rotation=True)
    torch.testing.assert_close(y.norm(), x.norm(), rtol=1e-5, atol=0)


def test_hamilton_matrix_holds_copies_of_the_weights():
    r, i, j, k = weights(dtype=torch.float32)
    matrix = quaternion_matrix(r, i, j, k)
    assert matrix.shape == (12, 20)
    assert torch.equal(matrix[:3, :5], r)
    assert torch.equal(matrix[3:6, :5], -i)
    assert torch.equal(matrix[9:, 5:10], j)
    assert torch.equal(matrix[6:9, 15:], i)


@pytest.mark.parametrize("rotate", [False, True])
def test_gradcheck(rotate):
    w = [t.requires_grad_() for t in weights(2, 3)]
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(12, dtype=torch.float64, requires_grad=True)
    s = torch.randn(2, 3, dtype=torch.float64, requires_grad=True) if rotate else None
    assert torch.autograd.gradcheck(
        lambda x, b, s, *w: quaternion_linear(x, *w, b, rotation=rotate, scale=s), (x, b, s, *w)
    )


@pytest.mark.parametrize("rotate", [False, True])
def test_zero_half_is_the_full_product_with_zeros_in_front(rotate):
    w, b = weights(), torch.randn(20).double()
    half = torch.randn(2, 7, 6, dtype=torch.float64)
    full = torch.cat([torch.zeros_like(half), half], dim=-1)
    want = rotation(full, *w) if rotate else hamilton(full, *w)
    got = quaternion_linear(half, *w, b, rotation=rotate, zero_half=True)
    torch.testing.assert_close(got, want + b)
    with pytest.raises(ValueError, match=r"expected \[..., 6\], two times the 3 rows"):
        quaternion_linear(full, *w, zero_half=True)


def test_groups_are_layers_of_their_own():
    w = [torch.randn(4, 3, 5, dtype=torch.float64) for _ in range(4)]
    x, b = torch.randn(4, 2, 7, 12, dtype=torch.float64), torch.randn(4, 20).double()
    want = [hamilton(x[g], *(t[g] for t in w)) + b[g] for g in range(4)]
    torch.testing.assert_close(quaternion_linear(x, *w, b), torch.stack(want))
    with pytest.raises(ValueError, match=r"expected \[4, ..., 12\]"):
        quaternion_linear(x[:3], *w, b)


def test_grouped_zero_half_layer():
    layer = fa.QuaternionLinear(16, 8, zero_half=True, groups=3, rotation=True, scale=True)
    x = torch.randn(3, 5, 8)
    want = torch.einsum("gnk,gkm->gnm", x, layer.dense_matrix()) + layer.bias[:, None]
    torch.testing.assert_close(layer(x), want)
    single = fa.QuaternionLinear(16, 8, rotation=True, scale=True)
    single.load_state_dict({name: t[1] for name, t in layer.state_dict().items()})
    full = torch.cat([torch.zeros(5, 8), x[1]], dim=-1)
    torch.testing.assert_close(layer(x)[1], single(full))


def test_autocast_computes_in_autocasts_dtype():
    layer = fa.QuaternionLinear(16, 8)
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)


def test_no_rows():
    assert fa.QuaternionLinear(8, 4)(torch.empty(0, 8)).shape == (0, 4)


def test_layer_compiles_whole():
    layer = fa.QuaternionLinear(8, 4, rotation=True, scale=True)
    x = torch.randn(3, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_upstream_state_dicts_load_as_they_are():
    shape = (3, 2)
    keys = ("r_weight", "i_weight", "j_weight", "k_weight", "scale_param", "zero_kernel")
    state = {key: torch.randn(shape) for key in keys} | {"bias": torch.randn(8)}
    layer = fa.QuaternionLinear(12, 8, rotation=True, scale=True)
    layer.load_state_dict(state)
    assert torch.equal(layer.j_weight, state["j_weight"])
    assert "zero_kernel" in state  # the caller's dict is not ours to change
    x = torch.randn(5, 12)
    w = [state[key] for key in keys[:4]]
    want = rotation(x, *w, state["scale_param"]) + state["bias"]
    torch.testing.assert_close(layer(x), want)


def test_initial_weights_have_the_stated_scale_and_a_seed():
    a = fa.QuaternionLinear(400, 200, init="he", generator=torch.Generator().manual_seed(1))
    b = fa.QuaternionLinear(400, 200, init="he", generator=torch.Generator().manual_seed(1))
    assert torch.equal(a.k_weight, b.k_weight)
    square = sum(w.square() for w in (a.r_weight, a.i_weight, a.j_weight, a.k_weight))
    # E[chi(4)²] = 4, and s² = 1 / (2·I)
    torch.testing.assert_close(square.mean().item(), 4 / (2 * 100), rtol=0.05, atol=0)
    assert not a.bias.any()


def test_repr_names_the_form():
    assert "hamilton" in repr(fa.QuaternionLinear(8, 4))
    assert "rotation" in repr(nn.Sequential(fa.QuaternionLinear(8, 4, rotation=True)))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"in_features": 6, "out_features": 8}, "in_features is 6"),
        ({"in_features": 8, "out_features": 0}, "out_features is 0"),
        ({"in_features": 8, "out_features": 8, "scale": True}, "rotation=True"),
        ({"in_features": 8, "out_features": 8, "init": "xavier"}, "init is 'xavier'"),
        ({"in_features": 8, "out_features": 8, "groups": 0}, "groups is 0"),
    ],
)
def test_impossible_layers_are_refused(kwargs, says):
    with pytest.raises(ValueError, match=says):
        fa.QuaternionLinear(**kwargs)


def test_shapes_that_do_not_fit_are_named():
    w = weights()
    x = torch.randn(7, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"x has shape \(7, 11\).*12"):
        quaternion_linear(x[:, :11], *w)
    with pytest.raises(ValueError, match=r"weight_j has shape \(2, 5\); expected \(3, 5\)"):
        quaternion_linear(x, w[0], w[1], w[2][:2], w[3])
    with pytest.raises(ValueError, match=r"bias has shape \(5,\); expected \(20,\)"):
        quaternion_linear(x, *w, torch.randn(5).double())
    with pytest.raises(ValueError, match="rotation"):
        quaternion_linear(x, *w, scale=w[0])


@pytest.mark.skipif(INTERPRETING, reason="there the kernels do run on the CPU")
def test_triton_on_the_cpu_says_why_not():
    with pytest.raises(BackendError, match="cpu"):
        quaternion_linear(torch.randn(2, 12), *weights(dtype=torch.float32), backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        quaternion_linear(torch.randn(2, 12).double(), *weights(), backend="cuda")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": torch.float64}, "x has dtype torch.float64"),
        ({"k": ((3, 5), torch.bfloat16)}, "weight_k torch.bfloat16"),
        ({"bias": ((20,), torch.float64)}, "bias has dtype"),
        ({"x_shape": (2**31, 12)}, "rows or more"),
    ],
)
def test_what_the_kernels_do_not_cover_is_named(change, says):
    from fastadapt.kernels.quaternion_linear.op import _check

    w = ((3, 5), torch.float32)
    call = {"x_shape": (7, 12), "dtype": torch.float32, "r": w, "i": w, "j": w, "k": w}
    call |= {"bias": None, "scale": None, "rotation": False, "zero_half": False}
    assert _check(**call) == (None, True)
    assert _check(**call | {"x_shape": (65, 12)}) == (None, False)  # in fp32, cuBLAS is faster
    why_not, fast = _check(**call | change)
    assert says in why_not and not fast


@pytest.mark.parametrize("zero_half", [False, True])
@pytest.mark.parametrize("kind", ["output", "input", "weights"])
def test_the_order_of_terms_is_the_hamilton_product(kind, zero_half):
    """What the kernel for large layers on Hopper does, step by step."""
    launchers = pytest.importorskip("fastadapt.kernels.quaternion_linear.launches")
    order, negative, terms = launchers._terms(kind, zero_half)
    x, g, w = torch.randn(4, 5, 2), torch.randn(4, 5, 3), torch.randn(4, 2, 3)
    if zero_half:
        x[:2] = 0
    left, right = {"output": (x, w), "input": (g, w.mT), "weights": (x.mT, g)}[kind]
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    y = hamilton(torch.cat(list(leaves[0]), -1), *leaves[1])
    dx, dw = torch.autograd.grad(y, leaves, torch.cat(list(g), -1))
    want = {"output": torch.stack(y.chunk(4, -1)), "input": dx, "weights": dw}[kind]
    for c in range(4):
        total = torch.zeros_like(want[c])
        for term in range(terms):
            if term == (negative >> (4 * c)) & 7:
                total = -total
            a = (order >> (8 * c + 2 * term)) & 3
            total = total + left[a] @ right[a ^ c]
        if terms == (negative >> (4 * c)) & 7:
            total = -total
        torch.testing.assert_close(total, want[c])


# The kernels, by the same standard in the interpreter and on the GPU


def make(m, i, o, dtype, device="cpu", *, groups=None, form="hamilton", zero_half=False):
    """Arguments of ``quaternion_linear``, with bias and scale, and a gradient of its output."""
    leading = () if groups is None else (groups,)

    def normal(*shape, factor=1.0):
        return (torch.randn(*leading, *shape, device=device) * factor).to(dtype)

    x = normal(m, (2 if zero_half else 4) * i)
    w = [normal(i, o, factor=(4 * i) ** -0.5) for _ in range(4)]
    scale = normal(i, o) if form == "scaled rotation" else None
    kwargs = {"rotation": form != "hamilton", "zero_half": zero_half}
    return [x, *w, normal(4 * o), scale], normal(m, 4 * o), kwargs


def call(function, args, kwargs):
    return function(*args[:6], scale=args[6], **kwargs)


def with_triton(*args, **kwargs):
    return quaternion_linear(*args, backend="triton", **kwargs)


def output_and_gradients(function, args, g, kwargs, dtype=None):
    return kernel_checks.output_and_gradients(
        lambda *leaves: call(function, leaves, kwargs), args, g, dtype
    )


def errors_beyond_pytorch(args, g, kwargs, function=with_triton):
    """Where output or gradients have more than twice PyTorch's error in the same dtype."""

    def few(name, exact):  # or few different ones
        count = exact.numel()
        return count < 1000 or exact.flatten()[:: count // 1000].unique().numel() < 500

    truth = output_and_gradients(quaternion_linear_reference, args, g, kwargs, torch.float64)
    reference = output_and_gradients(quaternion_linear_reference, args, g, kwargs)
    ours = output_and_gradients(function, args, g, kwargs)
    names = [n for n, t in zip(NAMES, ["y", *args], strict=True) if t is not None]
    return beyond_pytorch(names, ours, reference, truth, args[0].dtype, few=few)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("zero_half", [False, True])
def test_operands_that_lie_as_usual_have_the_launch_of_their_strides(back, zero_half, monkeypatch):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    from fastadapt.kernels.common.launcher import Device, Launch
    from fastadapt.kernels.quaternion_linear import launches as launch

    hopper = Device(0, 132, 232_448, 9)
    m, i, o, dtype = 300, 512, 576, torch.bfloat16
    form = launch.Form(i, o, None, False, False, zero_half, dtype, dtype, False)
    x = torch.empty(m, 4 * o if back else (2 if zero_half else 4) * i, dtype=dtype)
    weights = [torch.empty(i, o, dtype=dtype) for _ in range(4)]
    rows = launch.Rows(1, m, 0, x.shape[1], 1)
    out = torch.empty(m, (2 if zero_half else 4) * i if back else 4 * o, dtype=dtype)
    called = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: called.append((self, tensors)))

    def launched():
        launch._large_linear(x, rows, weights, None, out, form, hopper, back, None)()
        return called.pop()

    run, tensors = launched()
    assert all(a is b for a, b in zip(tensors, (x, *weights, out, None, None), strict=True))
    monkeypatch.setattr(launch, "_is_packed", lambda t: False)
    assert launched()[0] is run
    weights[0] = torch.empty(i, o + 8, dtype=dtype)[:, :o]
    assert launched()[0] is not run


# In the interpreter. bf16 products are wrong there, so fp16 and fp32.


@interpreted
@pytest.mark.parametrize("parts", [(2, 1), (3, 64), (16, 65), (40, 392)])
def test_interpreted_parts_are_added(parts, poisoned_empty):
    from fastadapt.kernels.common.launcher import device_of
    from fastadapt.kernels.quaternion_linear import launches as launch

    a, b = parts
    pairs = [(torch.randn(a, 300), torch.empty(300)), (torch.randn(b, 70), torch.empty(70))]
    launch._reduce(device_of(None), *pairs)()
    for found, out in pairs:
        torch.testing.assert_close(out, found.sum(0))


@starts_interpreter
def test_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["hamilton", "rotation", "scaled rotation"])
@pytest.mark.parametrize(
    ("m", "i", "o", "groups", "zero_half"),
    [
        (5, 7, 9, None, False),
        (1, 1, 1, None, True),
        (70, 40, 33, None, False),  # several tiles each way
        (70, 33, 40, None, True),
        (3, 17, 5, 3, False),
        (20, 16, 32, 2, True),
    ],
)
def test_interpreted(m, i, o, groups, zero_half, form, dtype, poisoned_empty):
    args, g, kwargs = make(m, i, o, dtype, groups=groups, form=form, zero_half=zero_half)
    assert not errors_beyond_pytorch(args, g, kwargs)


@interpreted
def test_interpreted_strides_and_no_bias():
    args, _, kwargs = make(9, 6, 8, torch.float16)
    args[0] = torch.randn(10, 2, 48).half()[1:, :, ::2].transpose(0, 1)
    args[2] = args[2].t().contiguous().t()
    args[5] = None
    g = torch.randn(1, 1, 32).half().expand(2, 9, 32)
    assert not errors_beyond_pytorch(args, g, kwargs)


@interpreted
@pytest.mark.parametrize("form", ["hamilton", "scaled rotation"])
def test_interpreted_gradients_asked_for_singly(form):
    args, g, kwargs = make(9, 6, 8, torch.float16, form=form)
    together = output_and_gradients(with_triton, args, g, kwargs)[1:]
    for asked, expected in enumerate(together):
        leaves = [
            None if t is None else t.detach().clone().requires_grad_(n == asked)
            for n, t in enumerate(args)
        ]
        (alone,) = torch.autograd.grad(call(with_triton, leaves, kwargs), leaves[asked], g)
        assert torch.equal(alone, expected)


@interpreted
@pytest.mark.parametrize("form", ["hamilton", "scaled rotation"])
def test_interpreted_opcheck(form):
    args, _, kwargs = make(9, 6, 8, torch.float16, form=form, zero_half=True)
    args = [None if t is None else t.requires_grad_() for t in args]
    torch.library.opcheck(torch.ops.fastadapt.quaternion_linear.default, (*args, *kwargs.values()))


@interpreted
def test_interpreted_no_rows():
    args, g, kwargs = make(0, 6, 8, torch.float16)
    y, dx, *rest = output_and_gradients(with_triton, args, g, kwargs)
    assert y.shape == (0, 32) and dx.shape == (0, 24)
    assert not any(t.any() for t in rest)


@interpreted
def test_interpreted_weights_of_another_dtype():
    """As under autocast: the weights' gradients are in the weights' dtype."""
    args, g, kwargs = make(9, 6, 8, torch.float32)
    args[0], g = args[0].half(), g.half()
    got = output_and_gradients(with_triton, args, g, kwargs)
    want = output_and_gradients(quaternion_linear_reference, args, g, kwargs, torch.float64)
    assert [t.dtype for t in got] == [torch.float16] * 2 + [torch.float32] * 5
    for mine, exact in zip(got, want, strict=True):
        assert relative_error(mine, exact) < 1e-3


# On the GPU


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


def random_case(case):
    """One call with random sizes, dtypes, strides; returns what is wrong with it."""
    torch.manual_seed(case)
    choose = random.Random(case)
    dtype = choose.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32])
    sizes = [1, 3, 16, 30, 63, 64, 96, 128, 192, 250, 256, 320, 512, 1024]
    i, o = choose.choice(sizes), choose.choice(sizes)
    form = choose.choice(["hamilton", "hamilton", "hamilton", "rotation", "scaled rotation"])
    zero_half = choose.random() < 0.4
    groups = choose.choice([None, None, None, 1, 2, 8])
    m = choose.choice([1, 2, 7, 8, 16, 17, 33, 64, 100, 256, 511, 513, 640, 1000, 3000])
    if case % 4:
        m = min(m, 256)
    args, g, kwargs = make(m, i, o, dtype, "cuda", groups=groups, form=form, zero_half=zero_half)
    kind = choose.choice(["plain", "plain", "sliced", "transposed", "expanded", "odd"])
    x, leading = args[0], () if groups is None else (groups,)
    if kind == "sliced":
        args[0] = torch.cat([x, x], -1)[..., x.shape[-1] :]
        g = torch.cat([g, g], -2)[..., m:, :]
    elif kind == "transposed":
        args[0] = x.mT.contiguous().mT
        args[2] = args[2].mT.contiguous().mT
        g = g.mT.contiguous().mT
    elif kind == "expanded":
        g = g[..., :1, :].expand(*leading, m, 4 * o)
    elif kind == "odd":  # more dimensions, addresses that are not aligned
        x = torch.cat([x.flatten(), x.flatten()[:1]])[1:].view_as(x)
        args[0] = x.unsqueeze(-2).expand(*x.shape[:-1], 2, x.shape[-1])
        g = g.unsqueeze(-2).expand(*g.shape[:-1], 2, g.shape[-1])
    if case % 7 == 0:
        args[5] = None
    found = errors_beyond_pytorch(args, g, kwargs)
    if found:
        found.insert(0, f"case {case}: {m, i, o, groups, dtype, kind, kwargs}")
    return found


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
def test_gpu_exports(monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")
    layer = fa.QuaternionLinear(256, 128, zero_half=True).to("cuda", torch.bfloat16)
    x = torch.randn(4, 3, 128, device="cuda", dtype=torch.bfloat16)
    program = torch.export.export(layer, (x,))
    assert "fastadapt.quaternion_linear" in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))


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


@gpu
def test_gpu_layers_use_the_kernels(monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")
    layer = fa.QuaternionLinear(1024, 768, zero_half=True, groups=8).to("cuda", torch.bfloat16)
    x = torch.randn(8, 4, 2, 512, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile() as profile:
        y = layer(x)
    assert any("linear_kernel" in event.name for event in profile.events())
    want = torch.einsum("gbnk,gkm->gbnm", x.double(), layer.dense_matrix().double())
    assert relative_error(y, want) < 1e-2
