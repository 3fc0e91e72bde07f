import copy

import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt.bench.harness import relative_error
from fastadapt.layers import cladapter
from tests.helpers.upstream import UpstreamPost

SIZES = {"depth": 2, "num_centers": 5, "rank": 6, "mlp_ratio": 2.0}


def adapter(dim=8, **kwargs):
    return fa.CLAdapter(dim, **{**SIZES, **kwargs})


def from_upstream(upstream, dim=8):
    ours = adapter(dim)
    ours.load_state_dict(fa.convert_cladapter_state_dict(upstream.state_dict(), part="adapter"))
    return ours


def test_equals_upstream_to_fp32_rounding():
    upstream = UpstreamPost(8, depth=2, centers=5, rank=6, mlp_ratio=2.0)
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(from_upstream(upstream)(x), upstream(x), rtol=1e-5, atol=1e-5)
    # What is left is rounding: in fp64 it is gone.
    exact = from_upstream(upstream).double()(x.double())
    torch.testing.assert_close(exact, upstream.double()(x.double()), rtol=1e-12, atol=1e-12)


def test_maps_and_volumes_are_their_tokens():
    layer = adapter()
    for spatial in [(3, 4), (2, 3, 4)]:
        x = torch.randn(2, 8, *spatial)
        tokens = layer(x.flatten(2).transpose(1, 2))
        want = tokens.transpose(1, 2).unflatten(2, spatial)
        torch.testing.assert_close(layer(x), want)
        last = adapter(channels_last=True)
        last.load_state_dict(layer.state_dict())
        torch.testing.assert_close(last(x.movedim(1, -1)), want.movedim(1, -1))


def test_token_mode_mixes_tokens():
    layer = fa.ClusterAttention(8, num_centers=3, mode="token", num_tokens=5)
    assert [name for name, _ in layer.named_parameters()] == ["centers", "transforms"]
    assert layer.transforms.shape == (3, 5, 5)
    x = torch.randn(2, 5, 8)
    a = fa.kernels.center_attention(x, layer.centers)
    mixed = torch.einsum("bk,knm->bnm", a, layer.transforms)
    torch.testing.assert_close(layer(x), mixed @ x)
    with pytest.raises(ValueError, match=r"4 tokens.*made for 5"):
        layer(x[:, :4])


def test_compiles_whole_and_under_autocast():
    layer, x = adapter(), torch.randn(2, 7, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-2, atol=2e-2)


@pytest.fixture
def fused(monkeypatch):
    """The fused operations that were called, as if there were a GPU."""
    calls = []
    monkeypatch.setattr(cladapter, "why_not_device", lambda x: None)
    for name in ("layer_norm", "layer_norm_mean", "layer_norm_twice", "residual_mlp"):
        function = getattr(cladapter, name)

        def recorded(*args, name=name, function=function, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(cladapter, name, recorded)
    return calls


def test_fused_operations_stand_for_plain_modules(fused, monkeypatch):
    layer, x = adapter(), torch.randn(2, 7, 8)
    y = layer(x)
    first, second = ["layer_norm_twice", "residual_mlp"], ["layer_norm", "residual_mlp"]
    assert fused == [*first, *second, "layer_norm"]
    fused.clear()
    pooled = layer.forward_pooled(x)
    assert fused == [*first, *second, "layer_norm_mean"]
    monkeypatch.undo()
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
    torch.testing.assert_close(pooled, layer.forward_pooled(x), rtol=0, atol=0)
    torch.testing.assert_close(pooled, y.mean(1))


def with_another_linear(block):
    class Quantised(nn.Linear):
        pass

    block.mlp.fc1 = Quantised(8, 16)


def without_bias(block):
    block.mlp.fc1 = nn.Linear(8, 16, bias=False)


def parametrised(block):
    nn.utils.parametrizations.weight_norm(block.mlp.fc2)


def with_another_forward(block):
    block.mlp.forward = block.mlp.forward


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.mlp.register_forward_hook(lambda *_: None),
        lambda block: block.mlp.fc1.register_forward_pre_hook(lambda *_: None),
        lambda block: block.mlp.fc2.register_full_backward_hook(lambda *_: None),
        lambda block: setattr(block, "mlp", nn.Sequential(nn.Linear(8, 8), nn.GELU())),
        with_another_linear,
        lambda block: setattr(block, "ln_2", nn.Identity()),
        without_bias,
        parametrised,
        with_another_forward,
    ],
)
def test_changed_modules_are_called(change, fused):
    layer, x = adapter(depth=1), torch.randn(2, 7, 8)
    change(layer.blocks[0])
    layer(x)
    assert fused == ["layer_norm_twice", "layer_norm"]
    fused.clear()
    layer.norm1.register_forward_hook(lambda *_: torch.zeros_like(x))
    layer(x)
    assert fused == ["layer_norm"] * 2
    fused.clear()
    layer.norm2.register_forward_hook(lambda *_: torch.ones_like(x))
    assert layer.forward_pooled(x).unique() == 1
    assert fused == ["layer_norm"]


@pytest.mark.parametrize(
    "part", [lambda layer: layer.blocks[0], lambda layer: layer.blocks[0].ln_1]
)
def test_the_first_block_is_called_where_it_has_hooks(part, fused):
    layer, x = adapter(depth=1), torch.randn(2, 7, 8)
    seen = []
    part(layer).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer(x)
    torch.testing.assert_close(seen[0], layer.norm1(x))
    assert "layer_norm_twice" not in fused


def test_exporters_see_the_modules_and_compilers_the_norms(fused):
    layer, x = adapter(depth=1), torch.randn(2, 7, 8)
    torch.export.export(layer, (x,))
    assert not fused
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert fused == ["residual_mlp"]


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_gpu_is_as_exact_as_pytorch(autocast, monkeypatch):
    """Output and gradients within twice PyTorch's own error, against fp64."""
    layer = fa.CLAdapter(96, depth=2, num_centers=5, rank=32).cuda()
    x = torch.randn(8, 50, 96, device="cuda")[:, 1:]
    if autocast is None:
        layer, x = layer.bfloat16(), x.bfloat16()

    def run(layer, x, backend, autocast=None):
        monkeypatch.setenv("FASTADAPT_BACKEND", backend)
        x = x.detach().requires_grad_()
        with torch.autocast("cuda", autocast, enabled=autocast is not None):
            y = layer(x).mean(dim=1)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    truth = run(copy.deepcopy(layer).double(), x.double(), "reference")
    theirs, ours = run(layer, x, "reference", autocast), run(layer, x, "auto", autocast)
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    for name, mine, their, exact in zip(names, ours, theirs, truth, strict=True):
        assert mine.dtype == their.dtype, name
        slack = 2 * torch.finfo(autocast or torch.bfloat16).eps
        assert relative_error(mine, exact) <= 2 * relative_error(their, exact) + slack, name


def test_every_parameter_gets_a_gradient():
    layer = adapter()
    layer(torch.randn(2, 7, 8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_reset_draws_anew():
    layer = adapter()
    before = {name: p.clone() for name, p in layer.named_parameters()}
    layer.reset_parameters()
    same = [name for name, p in layer.named_parameters() if torch.equal(p, before[name])]
    assert all("norm" in name or "ln_" in name for name in same)


def test_repr_is_short_and_says_the_sizes():
    assert "dim=8" in repr(adapter())
    assert "rank=6, mode=channel" in repr(adapter())
    assert "num_tokens=5" in repr(fa.ClusterAttention(8, mode="token", num_tokens=5))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fa.CLAdapter(8, depth=0), "depth is 0"),
        (lambda: fa.CLAdapter(8, mlp_ratio=0.01), "mlp_ratio is 0.01"),
        (lambda: fa.CLAdapter(8, rank=0), "rank is 0"),
        (lambda: fa.ClusterAttention(8, mode="tokens"), "mode is 'tokens'"),
        (lambda: fa.ClusterAttention(8, mode="token"), "needs num_tokens"),
        (lambda: adapter()(torch.randn(2, 8)), r"shape \(2, 8\)"),
        (lambda: adapter()(torch.randn(2, 4, 3, 3)), "4 channels in dimension 1.*dim=8"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
