"""Exported programs hold GELU in products and the convolution's kernel, and compute the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastadapt.export.backends import graph_fusion
from fastadapt.export.backends.aotinductor import build_aoti
from fastadapt.export.backends.graph_fusion import Fusions, fuse, on_gpu_in_half
from fastadapt.export.settings import Batches
from tests.export.fused.test_convert import deployed, images, make_convnext
from tests.helpers.compilers import build_or_skip
from tests.helpers.kernel_checks import INTERPRETING

DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)


def exported(model, x):
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=DYNAMIC)


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.skipif(INTERPRETING, reason="traces what is compiled")
def test_a_convnext(monkeypatch):
    pytest.importorskip("triton")
    model, x = deployed(make_convnext(depths=(1, 1, 1, 1))), images(4)
    program = exported(model, x)
    assert fuse(program, on_gpu_in_half) == (None, Fusions())  # on a CPU
    module, found = fuse(program, lambda x: True)
    assert found == Fusions(gelu=5, depthwise=4)  # of four blocks and the adapter
    names = operators(exported(module, x))
    assert names.count("aten._addmm_activation.default") == 5
    assert names.count("fastadapt.depthwise_layer_norm.default") == 4
    assert "aten.gelu.default" not in names and names.count("aten.conv2d.default") == 4
    monkeypatch.setattr(graph_fusion, "_fuse_depthwise", lambda *args: False)  # needs a GPU
    module, found = fuse(program, lambda x: True)
    assert found == Fusions(gelu=5)
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


class Layers(nn.Module):
    """A linear layer and GELU, and what may keep them apart."""

    def __init__(self, outputs=16, bias=True, form="none", twice=False):
        super().__init__()
        self.linear = nn.Linear(8, outputs, bias)
        self.form, self.twice = form, twice

    def forward(self, x):
        y = self.linear(x)
        return F.gelu(y, approximate=self.form) + (y if self.twice else 0)


def test_only_what_is_the_same_is_fused():
    x = torch.randn(3, 8)
    for model, count in (
        (Layers(), 1),
        (Layers(outputs=12), 0),
        (Layers(bias=False), 0),
        (Layers(form="tanh"), 0),
        (Layers(twice=True), 0),
    ):
        module, found = fuse(exported(model, x), lambda x: True)
        assert found == Fusions(gelu=count)
        if module is not None:
            torch.testing.assert_close(module(x), model(x))
    norm, conv = nn.LayerNorm(8), nn.Conv2d(8, 8, 7, padding=3, groups=8)
    for change, count in (
        (lambda y: y.permute(0, 2, 3, 1), 1),
        (lambda y: y.permute(0, 3, 2, 1), 0),
        (lambda y: y.relu().permute(0, 2, 3, 1), 0),
    ):
        model = nn.Sequential(conv, nn.Identity(), norm)
        model[1].forward = change
        _, found = fuse(exported(model, torch.randn(2, 8, 8, 8)), lambda x: True)
        assert found == Fusions(depthwise=count)


@pytest.mark.gpu
def test_gpu_a_convnext(tmp_path):
    from fastadapt.export.precision.half import MixedPrecision, precision_units
    from fastadapt.export.runtimes import load_runtime

    whole, x = deployed(make_convnext(depths=(1, 1, 1, 1))), images(8).cuda()
    units = precision_units(whole.model, torch.rand(1, 3, 32, 32))
    whole.model = MixedPrecision(whole.model, torch.bfloat16, units)
    whole, path = whole.cuda(), tmp_path / "m.pt2"
    details = build_or_skip(build_aoti, whole, (x[:1],), path, Batches(1, 8, 8), precision="bf16")
    assert details["gelu_in_products"] == 5
    assert "depthwise_norm_kernel" in details["triton_kernels"]
    with torch.no_grad():
        want = whole(x)
    runtime = load_runtime(path, device="cuda")
    for batch in (1, 5, 8):
        assert (runtime(x[:batch]) - want[:batch]).abs().max() < 0.05 * want.std()
