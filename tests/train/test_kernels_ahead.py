"""Kernels compile before a run's first launch, and nothing else changes."""

import shutil
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastadapt as fa
from fastadapt.train import kernels_ahead
from fastadapt.train.config import TrainConfig
from fastadapt.train.kernels_ahead import Call, begin_kernels, call_adapter, calls_of
from tests.helpers.kernel_checks import gpu

BF16, FP16 = torch.bfloat16, torch.float16
GPU = torch.device("cuda", 0)


class Layout(nn.Module):
    """Give features of a layout, as a backbone does."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.conv = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x):
        y = self.conv(x)
        if self.layout == "channels_first":
            return y
        return y.permute(0, 2, 3, 1) if self.layout == "channels_last" else y.flatten(2).mT


def adapted(layout="channels_first", **settings):
    config = fa.AdaptConfig(
        rank=8, num_centers=3, layout=layout, input_size=(3, 16, 16), **settings
    )
    return fa.adapt(Layout(layout), config, 2)


def test_calls_are_those_of_the_stages():
    two = TrainConfig(stages=2, batch_size=8, batch_size2=96)
    assert calls_of(two, BF16, True) == [
        Call(8, FP16, True, False),
        Call(64, FP16, False, False),
        Call(96, BF16, True, True),
        Call(96, BF16, False, False),
    ]
    full = TrainConfig(full=True, stages=1, batch_size=8)
    assert calls_of(full, BF16, False) == [Call(8, BF16, True, True), Call(64, BF16, False, False)]


@pytest.mark.parametrize("layout", ["tokens", "channels_first", "channels_last"])
def test_adapter_and_head_are_called_and_left_as_they_were(layout, monkeypatch):
    model = adapted(layout)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    for module in (model.adapter, model.head):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    state, mode = torch.get_rng_state(), model.training
    call_adapter(model, calls_of(TrainConfig(stages=2), BF16, True), torch.device("cpu"), BF16)
    # CLAdapter, where it is unmodified and without hooks, is called with its pooling.
    assert seen.count("Linear") == 4
    assert torch.equal(torch.get_rng_state(), state) and model.training is mode
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_linear_probe_has_no_kernels(monkeypatch):
    monkeypatch.setattr(kernels_ahead, "_features", None)
    calls = calls_of(TrainConfig(), BF16, True)
    call_adapter(adapted(adapter="none"), calls, torch.device("cpu"), BF16)


def test_where_nothing_compiles_ahead():
    model, config = adapted(), TrainConfig()
    assert begin_kernels(model, config, torch.device("cpu"), BF16, True) is None
    assert begin_kernels(model, config, GPU, None, True) is None


def test_a_failure_is_left_to_the_launch(monkeypatch):
    def fail(device):
        asked.append(device)
        raise RuntimeError("no GPU")

    asked, seen = [], []
    monkeypatch.setattr(torch.cuda, "device", fail)
    monkeypatch.setattr(threading, "excepthook", seen.append)
    begin_kernels(adapted(), TrainConfig(), GPU, BF16, True).join()
    assert asked == [GPU] and not seen


def test_what_was_compiled_is_marked(tmp_path, monkeypatch):
    called = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(kernels_ahead, "why_not_device", lambda x: None)
    monkeypatch.setattr(
        kernels_ahead, "compile_image_operators", lambda *given: called.append(given) or []
    )

    def compile_all(calls, **settings):
        kernels_ahead._compile(adapted(**settings), calls, torch.device("cpu"), BF16)
        return len(called)

    first, other = ([Call(rows, FP16, True, False)] for rows in (4, 8))
    assert [compile_all(calls) for calls in (first, first, other, first)] == [1, 1, 2, 2]
    assert compile_all(first, mlp_ratio=1.0) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 3
    shutil.rmtree(tmp_path / "cache")
    assert compile_all(first) == 4


@gpu
def test_launches_find_what_was_compiled(tmp_path, monkeypatch):
    from fastadapt.kernels.common.launcher import begun

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model = adapted(mlp_ratio=1.0).cuda().train()
    calls = [Call(8, FP16, True, False), Call(64, FP16, False, False)]
    kernels_ahead._compile(model, calls, GPU, BF16)
    kernels = list({id(a.kernel): a.kernel for a in begun()}.values())
    assert kernels
    count = [len(kernel.device_caches[0][0]) for kernel in kernels]
    for call in calls:
        x = torch.randn(call.rows, 8, 4, 4, device="cuda", dtype=FP16)
        model.train(call.training)
        with torch.autocast("cuda", BF16), torch.set_grad_enabled(call.training):
            y = model.classify_features(x)
        if call.training:
            y.float().sum().backward()
    assert [len(kernel.device_caches[0][0]) for kernel in kernels] == count
