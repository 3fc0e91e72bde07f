"""Launches through Triton, and those with meta tensors, that only compile."""

import types

import pytest
import torch

pytest.importorskip("triton")

from fastadapt.kernels.common import direct_launch


class Kernel:
    """Stand in for a jitted kernel of a tensor, two numbers and a constant."""

    def __init__(self):
        names = ("x_ptr", "rows", "channels")
        self.params = [types.SimpleNamespace(do_not_specialize=name == "rows") for name in names]
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launched.append((grid, arguments, options))


@pytest.fixture
def begun(monkeypatch):
    """Note what begins to compile, on a GPU that is not there."""
    found = []

    class Ahead:
        def __init__(self, kernel, device, arguments, options):
            found.append((kernel, device, arguments, options))

    monkeypatch.setattr(direct_launch, "Ahead", Ahead)
    monkeypatch.setattr(direct_launch, "_begun", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return found


def test_tensors_are_launched(begun):
    kernel, x = Kernel(), torch.zeros(4)
    direct_launch.launch(kernel, (3,), x, 5, 16, BC=8)
    assert kernel.launched == [((3,), (x, 5, 16), {"BC": 8})] and not begun


def test_meta_tensors_are_compiled_once_for_each_kind(begun):
    kernel = Kernel()

    def call(rows, channels, dtype=torch.bfloat16, **options):
        x = torch.empty(4, dtype=dtype, device="meta")
        return direct_launch.compiled_by(
            lambda: direct_launch.launch(kernel, (3,), x, rows, channels, **options)
        )

    assert len(call(5, 24, BC=8)) == 1
    assert call(7, 40, BC=8) == []  # rows are not specialised, 40 is no multiple of 16 either
    for other in ((5, 16, torch.bfloat16), (5, 1, torch.bfloat16), (5, 24, torch.float32)):
        assert len(call(*other, BC=8)) == 1
    assert len(call(5, 24, BC=16)) == 1
    assert not kernel.launched
    (_, device, (stand_in, *numbers), options), *others = begun
    assert (device, stand_in.dtype, numbers) == (1, torch.bfloat16, [5, 24])
    assert options == {"BC": 8} and len(others) == 4
