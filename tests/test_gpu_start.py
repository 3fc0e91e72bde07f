"""Starting a GPU ahead of time needs one, and never gets in the way."""

import torch

from fastadapt import gpu_start


def test_nothing_begins_without_a_reason(monkeypatch):
    assert gpu_start.begin_context("cuda") is None  # PyTorch is imported: it may have begun
    monkeypatch.delitem(gpu_start.sys.modules, "torch")
    assert gpu_start.begin_context("cpu") is None
    assert gpu_start.begin_context("cuda:one") is None
    assert gpu_start.begin_libraries(torch.device("cpu")) is None


def test_a_missing_driver_is_no_error(monkeypatch):
    monkeypatch.setattr(gpu_start, "LIBRARY", "libnot-there.so.1")
    monkeypatch.delitem(gpu_start.sys.modules, "torch")
    thread = gpu_start.begin_context("auto")
    assert thread is not None
    thread.join()
