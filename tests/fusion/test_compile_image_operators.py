"""What compiles ahead of a training step is what the step launches."""

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from fastadapt.fusion import compile_image_operators as ahead
from fastadapt.fusion.image_operators import ImageOperators, padded_channels, training_norms
from tests.helpers.kernel_checks import gpu


class Mixed(nn.Module):
    """Convolutions of several kinds, and batch norms with channels of every divisibility."""

    def __init__(self):
        super().__init__()
        act = timm.layers.BatchNormAct2d
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 1),
            act(24, act_layer=nn.ReLU6),
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
            act(24, act_layer=nn.SiLU),
            nn.Conv2d(24, 64, 1),
            act(64, act_layer=nn.ReLU),
            Conv2dSame(64, 64, 5, stride=2, groups=64, bias=False),
            act(64, apply_act=False),
            nn.Conv2d(64, 64, 7, padding=3, groups=64),
            nn.Conv2d(64, 64, 3, padding=2, dilation=2, groups=64),  # PyTorch's
            nn.Conv2d(64, 528, 1),
            nn.BatchNorm2d(528),
        )

    def forward(self, x):
        return self.layers(x)


def test_the_kernels_are_those_that_a_step_launches(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    from fastadapt.kernels.common import direct_launch, dispatch

    launched, compiled = {}, {}

    def note(found):
        def noted(kernel, arguments, options):
            kinds = [
                direct_launch._kind(value, parameter.do_not_specialize)
                if not hasattr(value, "dtype")
                else value.dtype
                for value, parameter in zip(arguments, kernel.params, strict=False)
            ]
            found[kernel.fn.__name__, *kinds, *sorted(options.items())] = arguments

        return noted

    def run(self, *arguments, grid, warmup, **options):
        note(launched)(self, arguments, options)

    class Ahead:
        def __init__(self, kernel, device, arguments, options):
            note(compiled)(kernel, arguments, options)

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(direct_launch, "Ahead", Ahead)
    monkeypatch.setattr(direct_launch, "_begun", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("depthwise_conv", "batch_norm_act"):
        module = __import__(f"fastadapt.kernels.{name}.op", fromlist=["op"])
        monkeypatch.setattr(module, "why_not_device", lambda x: None)
    monkeypatch.setattr(dispatch, "why_not_device", lambda x: None)

    model = Mixed().train()
    x = torch.randn(4, 3, 16, 16).bfloat16()
    operators = ImageOperators(training_norms(model), padded_channels(model), backend="triton")
    with torch.autocast("cpu", torch.bfloat16), operators:
        y = model(x)
    y.float().sum().backward()
    state = torch.get_rng_state()
    ahead._call_all(model, torch.bfloat16, True)
    assert torch.equal(state, torch.get_rng_state())
    missing = launched.keys() - compiled.keys()
    assert not missing
    # "same" padding of a stride of 2 depends on whether the size is even.
    extra = compiled.keys() - launched.keys()
    assert len(extra) == 3 and all(("P", 2) in kernel for kernel in extra)

    compiled.clear()
    direct_launch._begun.clear()
    ahead._call_all(model, torch.bfloat16, False)
    assert {kernel[0] for kernel in compiled} == {"forward_kernel"}


def test_where_there_is_nothing_to_compile():
    for backbone, training in ((nn.Linear(3, 3), True), (nn.BatchNorm2d(3), False)):
        assert ahead.compile_image_operators(backbone, torch.bfloat16, training) == []


@gpu
def test_launches_find_what_was_compiled(monkeypatch):
    from fastadapt.fusion.image_operators import image_operators
    from fastadapt.kernels.common import direct_launch

    model = Mixed().cuda().to(memory_format=torch.channels_last).train()
    for thread in ahead.compile_image_operators(model, torch.bfloat16, True):
        thread.join()
    kernels = {id(a.kernel): a.kernel for a in direct_launch._begun.values()}.values()
    count = [len(kernel.device_caches[0][0]) for kernel in kernels]
    x = torch.randn(4, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16), image_operators(model, x):
        y = model(x)
    y.float().sum().backward()
    assert [len(kernel.device_caches[0][0]) for kernel in kernels] == count
