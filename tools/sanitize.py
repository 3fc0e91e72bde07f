"""Run a representative set of small kernel calls, for compute-sanitizer; no test of its own.

    compute-sanitizer --tool memcheck python tools/sanitize.py
    compute-sanitizer --tool initcheck python tools/sanitize.py
    compute-sanitizer --tool racecheck python tools/sanitize.py quaternion_linear

Names of operations choose among them.

Every tile of every kernel variant comes up at sizes where tiles are cut off; memory is not cached,
so that every allocation has its own bounds.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from fastadapt.kernels import (
    cluster_attention,
    layer_norm,
    layer_norm_mean,
    layer_norm_twice,
    quaternion_linear,
    residual_mlp,
)
from fastadapt.kernels.cluster_attention.block_sizes import force_groups


def normal(*shape, dtype, scale=1.0):
    """Return normal numbers on the GPU that want a gradient."""
    return (torch.randn(*shape) * scale).to(dtype).cuda().requires_grad_()


def cluster_attention_step(b, n, c, r, k, dtype, token=False):
    """Run cluster attention forward and backward."""
    args = [
        normal(b, n, c, dtype=dtype),
        normal(c, k, dtype=dtype),
        normal(k, *((n, n) if token else (r, r)), dtype=dtype),
    ]
    if not token:
        args += [
            normal(r, c, dtype=dtype, scale=c**-0.5),
            normal(r, dtype=dtype),
            normal(c, r, dtype=dtype, scale=r**-0.5),
            normal(c, dtype=dtype),
        ]
    y = cluster_attention(*args, backend="triton")
    torch.autograd.grad(y, args, torch.randn(b, n, c).to(dtype).cuda())
    torch.cuda.synchronize()


def quaternion_linear_step(m, i, o, groups, dtype, rotation=False, zero_half=False):
    """Run a quaternion linear layer forward and backward."""
    leading = () if groups is None else (groups,)
    x = normal(*leading, m, (2 if zero_half else 4) * i, dtype=dtype)
    weights = [normal(*leading, i, o, dtype=dtype) for _ in range(4)]
    bias = normal(*leading, 4 * o, dtype=dtype)
    scale = normal(*leading, i, o, dtype=dtype) if rotation else None
    kwargs = {"rotation": rotation, "scale": scale, "zero_half": zero_half, "backend": "triton"}
    y = quaternion_linear(x, *weights, bias, **kwargs)
    leaves = [t for t in (x, *weights, bias, scale) if t is not None]
    torch.autograd.grad(y, leaves, torch.randn(*leading, m, 4 * o).to(dtype).cuda())
    torch.cuda.synchronize()


def quaternion_linear_steps() -> None:
    """Run quaternion linear layers of every form and kernel."""
    for case in (
        (8, 64, 64, None, torch.bfloat16),
        (8, 30, 63, 2, torch.bfloat16, False, True),
        (33, 63, 30, 2, torch.float16, True),
        (300, 64, 256, None, torch.bfloat16, True, True),
        (20, 33, 17, None, torch.float32),
        (600, 250, 128, None, torch.bfloat16),
        (3000, 250, 120, None, torch.bfloat16),
        (130, 512, 576, None, torch.bfloat16),  # this size and more: on Hopper its own kernel
        (700, 320, 256, None, torch.float16, False, True),
    ):
        quaternion_linear_step(*case)
        print("quaternion_linear", *case, flush=True)


def cluster_attention_steps() -> None:
    """Run cluster attention in every mode and with every kernel."""
    for groups in (0, 1, 2, 3):
        if groups and torch.cuda.get_device_capability()[0] != 9:
            continue
        for size in ((3, 70, 136, 64, 5), (2, 100, 72, 128, 20), (9, 17, 200, 256, 3)):
            with force_groups(groups, aligned=groups > 0):
                cluster_attention_step(*size, torch.bfloat16)
            print("cluster_attention", groups, size, flush=True)
    cluster_attention_step(3000, 3, 40, 96, 3, torch.bfloat16)  # short samples, many rows
    for size in ((2, 33, 60, 60, 33), (5, 1, 40, 16, 4), (1, 130, 63, 300, 2)):
        for dtype in (torch.float16, torch.float32):
            cluster_attention_step(*size, dtype)
            print("cluster_attention", size, dtype, flush=True)
    cluster_attention_step(3, 17, 40, None, 4, torch.bfloat16, token=True)


def residual_mlp_steps() -> None:
    """Run the norms and the residual MLP."""
    # The last has rows enough for the products of Hopper's own kernel.
    for m, c, hidden in ((700, 72, 264), (33, 63, 65), (3, 1000, 30), (8500, 72, 264)):
        for dtype in (torch.bfloat16, torch.float32):
            x, g = normal(2, m + 1, c, dtype=dtype)[:, 1:], torch.randn(2, 1, c).to(dtype).cuda()
            norm = [normal(c, dtype=dtype), normal(c, dtype=dtype)]
            mlp = [normal(*shape, dtype=dtype) for shape in ((hidden, c), (hidden,), (c, hidden))]
            for operation, args in (
                (layer_norm, [x, *norm]),
                (layer_norm_twice, [x, *norm, *norm]),
                (layer_norm_mean, [x, *norm]),
                (residual_mlp, [x, *norm, *mlp, normal(c, dtype=dtype)]),
            ):
                y = operation(*args, backend="triton")
                torch.autograd.grad(y, args, g[:, 0] if y.dim() == 2 else g.expand(y.shape))
                torch.cuda.synchronize()
                print(operation.__name__, m, c, hidden, dtype, flush=True)


STEPS = {
    "cluster_attention": cluster_attention_steps,
    "quaternion_linear": quaternion_linear_steps,
    "residual_mlp": residual_mlp_steps,
}


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or STEPS:
        STEPS[name]()
