import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt.kernels import quaternion_linear, quaternion_matrix
from tests.upstream import hamilton, rotation


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


def test_the_missing_triton_backend_says_so():
    with pytest.raises(fa.kernels.BackendError, match="no Triton kernels"):
        quaternion_linear(torch.randn(2, 12).double(), *weights(), backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        quaternion_linear(torch.randn(2, 12).double(), *weights(), backend="cuda")
