"""Quaternion linear layers: reference, checks, launches, kernels in the interpreter.

The interpreter is chosen before Triton is imported, so its cases run in a process of their own:
``python -m pytest`` on this file with TRITON_INTERPRET=1, started by ``test_interpreter.py``.
"""

from __future__ import annotations

import pytest
import torch

from fastadapt.bench.harness import relative_error
from fastadapt.kernels import (
    BackendError,
    quaternion_linear,
    quaternion_linear_reference,
    quaternion_matrix,
)
from fastadapt.kernels.quaternion_linear.hamilton_terms import hamilton_terms
from tests.helpers.kernel_checks import (
    INTERPRETING,
    interpreted,
)
from tests.helpers.quaternion_calls import (
    call,
    errors_beyond_pytorch,
    make,
    output_and_gradients,
    with_triton,
)
from tests.helpers.upstream import hamilton, rotation


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
    from fastadapt.kernels.quaternion_linear.checks import check_call

    w = ((3, 5), torch.float32)
    call = {"x_shape": (7, 12), "dtype": torch.float32, "r": w, "i": w, "j": w, "k": w}
    call |= {"bias": None, "scale": None, "rotation": False, "zero_half": False}
    assert check_call(**call) == (None, True)
    assert check_call(**call | {"x_shape": (65, 12)}) == (None, False)  # in fp32, cuBLAS is faster
    why_not, fast = check_call(**call | change)
    assert says in why_not and not fast


@pytest.mark.parametrize("zero_half", [False, True])
@pytest.mark.parametrize("kind", ["output", "input", "weights"])
def test_the_order_of_terms_is_the_hamilton_product(kind, zero_half):
    """What the kernel for large layers on Hopper does, step by step."""
    order, negative, terms = hamilton_terms(kind, zero_half)
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


# Launches


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("zero_half", [False, True])
def test_operands_that_lie_as_usual_have_the_launch_of_their_strides(back, zero_half, monkeypatch):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    from fastadapt.kernels.common.launcher import Device, Launch
    from fastadapt.kernels.quaternion_linear import launches_hopper
    from fastadapt.kernels.quaternion_linear.form import Form, GroupLayout

    hopper = Device(0, 132, 232_448, 9)
    m, i, o, dtype = 300, 512, 576, torch.bfloat16
    form = Form(i, o, None, False, False, zero_half, dtype, dtype, False)
    x = torch.empty(m, 4 * o if back else (2 if zero_half else 4) * i, dtype=dtype)
    weights = [torch.empty(i, o, dtype=dtype) for _ in range(4)]
    layout = GroupLayout(1, m, 0, x.shape[1], 1)
    out = torch.empty(m, (2 if zero_half else 4) * i if back else 4 * o, dtype=dtype)
    called = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: called.append((self, tensors)))

    def launched():
        launches_hopper.linear(
            x, layout, weights, None, out, form, hopper, backward=back, sums=None
        )()
        return called.pop()

    run, tensors = launched()
    assert all(a is b for a, b in zip(tensors, (x, *weights, out, None, None), strict=True))
    monkeypatch.setattr(launches_hopper, "is_packed", lambda t: False)
    assert launched()[0] is run
    weights[0] = torch.empty(i, o + 8, dtype=dtype)[:, :o]
    assert launched()[0] is not run


# In the interpreter. bf16 products are wrong there, so fp16 and fp32.


@interpreted
@pytest.mark.parametrize("parts", [(2, 1), (3, 64), (16, 65), (40, 392)])
def test_interpreted_parts_are_added(parts, poisoned_empty):
    from fastadapt.kernels.common.launcher import device_of
    from fastadapt.kernels.quaternion_linear.launches_sums import Reduction, sum_partials

    a, b = parts
    pairs = [
        Reduction(torch.randn(a, 300), torch.empty(300)),
        Reduction(torch.randn(b, 70), torch.empty(70)),
    ]
    sum_partials(device_of(None), *pairs)()
    for found, out in pairs:
        torch.testing.assert_close(out, found.sum(0))


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
