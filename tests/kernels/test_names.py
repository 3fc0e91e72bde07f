"""An operation's folder and its public function share a name."""

import importlib

import pytest

OPERATIONS = ("cluster_attention", "layer_norm", "quaternion_linear", "residual_mlp")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_function_is_bound_whatever_was_imported_before(operation):
    """Python binds a submodule to its package when it is first imported: here that was before."""
    kernels = importlib.import_module("fastadapt.kernels")
    importlib.import_module(f"fastadapt.kernels.{operation}.op")
    importlib.import_module(f"fastadapt.kernels.{operation}.block_sizes")
    assert callable(getattr(kernels, operation))
    assert getattr(kernels, operation).__name__ == operation
