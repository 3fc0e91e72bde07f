"""Random calls of every operation, by name: for the GPU tests and ``tools/random_calls.py``.

A function takes the case, which is the seed of all that is random, the device, and whether sizes
are small, for the interpreter; it returns what is wrong with the call, nothing if all is well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fastadapt.kernels import layer_norm, layer_norm_mean, layer_norm_twice, residual_mlp
from tests.helpers import (
    batch_norm_calls,
    cluster_attention_cases,
    depthwise_calls,
    quaternion_calls,
    row_operations,
)

_OPERATIONS: dict[str, Callable[..., list[str]]] = {
    "cluster_attention": cluster_attention_cases.random_case,
    "cluster_attention_hopper": partial(cluster_attention_cases.random_case, hopper=True),
    "quaternion_linear": quaternion_calls.random_case,
    "layer_norm": partial(row_operations.random_case, layer_norm),
    "layer_norm_twice": partial(row_operations.random_case, layer_norm_twice),
    "layer_norm_mean": partial(row_operations.random_case, layer_norm_mean),
    "residual_mlp": partial(row_operations.random_case, residual_mlp),
    "depthwise_conv2d": depthwise_calls.random_case,
    "batch_norm_act": batch_norm_calls.random_case,
}


def operations() -> dict[str, Callable[..., list[str]]]:
    """Return the operations that this machine can run, by name."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return {name: f for name, f in _OPERATIONS.items() if hopper or not name.endswith("_hopper")}
