"""The quaternion linear layer: initialization, upstream's state dicts, compilation, export."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt.bench.harness import relative_error
from tests.helpers.kernel_checks import gpu
from tests.helpers.upstream import rotation


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


@gpu
def test_gpu_exports(monkeypatch):
    monkeypatch.setenv("FASTADAPT_BACKEND", "triton")
    layer = fa.QuaternionLinear(256, 128, zero_half=True).to("cuda", torch.bfloat16)
    x = torch.randn(4, 3, 128, device="cuda", dtype=torch.bfloat16)
    program = torch.export.export(layer, (x,))
    assert "fastadapt.quaternion_linear" in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))
