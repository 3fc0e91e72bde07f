"""Cases of cluster attention, and what its tests compare with."""

from __future__ import annotations

import torch

from fastadapt.kernels import cluster_attention, cluster_attention_reference
from tests.helpers.kernel_checks import beyond_pytorch, output_and_gradients

NAMES = ("y", "x", "centers", "transforms", "down_weight", "down_bias", "up_weight", "up_bias")


def make(b, n, c, r, k, dtype, device="cpu", token=False, params=None):
    """Arguments of cluster_attention and a gradient of its output."""
    params = params or dtype

    def normal(*shape, scale=1.0, dtype=params):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    # A shared offset, so that mean tokens differ from noise.
    x = (torch.randn(b, n, c, device=device) + torch.randn(1, 1, c, device=device)).to(dtype)
    args = [x, normal(c, k), normal(k, *((n, n) if token else (r, r)))]
    if not token:
        args += [normal(r, c, scale=c**-0.5), normal(r), normal(c, r, scale=r**-0.5), normal(c)]
    return args, normal(b, n, c, dtype=dtype)


def assert_as_exact_as_pytorch(args, g, function=None):
    """Output and gradients within twice PyTorch's error in the same dtype, against fp64."""
    function = function or (lambda *a: cluster_attention(*a, backend="triton"))
    truth = output_and_gradients(cluster_attention_reference, args, g, torch.float64)
    reference = output_and_gradients(cluster_attention_reference, args, g)
    ours = output_and_gradients(function, args, g)
    names = [n for n, t in zip(NAMES, ["y", *args], strict=False) if t is not None]

    def few(name, exact):  # the centers' gradient hangs on B·K values
        values = args[0].shape[0] * args[1].shape[1] if name == "centers" else exact.numel()
        return values < 1000

    wrong = beyond_pytorch(names, ours, reference, truth, args[0].dtype, few=few)
    assert not wrong, ", ".join(wrong)
