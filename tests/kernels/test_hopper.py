"""The import of kernels for Hopper."""

from __future__ import annotations

import importlib

import pytest

from fastadapt.kernels.common import hopper


@pytest.fixture
def fresh():
    hopper.hopper_kernels.cache_clear()
    yield hopper.hopper_kernels
    hopper.hopper_kernels.cache_clear()


def test_modules_are_found_by_operation(fresh):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    assert fresh("residual_mlp").__name__ == "fastadapt.kernels.residual_mlp.hopper_kernels"
    assert fresh("quaternion_linear") is fresh("quaternion_linear")


@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_a_triton_without_what_they_need_has_none(error, fresh, monkeypatch):
    def missing(*args):
        raise error("no such name in this Gluon")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert fresh("residual_mlp") is None
