"""A representative set of kernel calls, small, for compute-sanitizer; no test of its own.

    compute-sanitizer --tool memcheck python tests/sanitize.py
    compute-sanitizer --tool initcheck python tests/sanitize.py
    compute-sanitizer --tool racecheck python tests/sanitize.py

Every tile of every kernel variant comes up at sizes where tiles are cut off; memory is not cached,
so that every allocation has its own bounds.
"""

from __future__ import annotations

import dataclasses
import os

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from fastadapt.kernels import cluster_attention
from fastadapt.kernels import cluster_attention_launch as launch


def normal(*shape, dtype, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype).cuda().requires_grad_()


def cluster_attention_step(b, n, c, r, k, dtype, token=False):
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


def main() -> None:
    torch.manual_seed(0)
    chosen = launch.config_for
    for groups in (0, 1, 2, 3):

        def config_for(x, rank, groups=groups):
            return dataclasses.replace(chosen(x, rank), groups=groups)

        launch.config_for = config_for
        for size in ((3, 70, 136, 64, 5), (2, 100, 72, 128, 20), (9, 17, 200, 256, 3)):
            if groups and torch.cuda.get_device_capability()[0] != 9:
                continue
            cluster_attention_step(*size, torch.bfloat16)
            print("cluster_attention", groups, size, flush=True)
    launch.config_for = chosen
    for size in ((2, 33, 60, 60, 33), (5, 1, 40, 16, 4), (1, 130, 63, 300, 2)):
        for dtype in (torch.float16, torch.float32):
            cluster_attention_step(*size, dtype)
            print("cluster_attention", size, dtype, flush=True)
    cluster_attention_step(3, 17, 40, None, 4, torch.bfloat16, token=True)


if __name__ == "__main__":
    main()
