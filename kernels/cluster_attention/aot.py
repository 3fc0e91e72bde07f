"""Attention over centers and the mixing of the transforms as one operator that compilers look into.

Cluster attention's other kernels take descriptors of tensors (TMA). AOTInductor of PyTorch 2.11
writes code for those that reads wrong shapes, and gives descriptors made on the GPU the memory of
one program for all of them. These two kernels take pointers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..common.arithmetic import ceil_div
from ..common.launcher import block
from .triton_forward import attend_kernel, mix_kernel

KERNELS = (attend_kernel.__name__, mix_kernel.__name__)


@triton_op("fastadapt::mixed_transforms", mutates_args=())
def mixed_transforms(sums: Tensor, centers: Tensor, transforms: Tensor, tokens: int) -> Tensor:
    """Mix the transforms for every sample; for inference, there is no backward.

    Unlike an operator of ``torch.library.custom_op`` it is traced through: what is compiled ahead
    holds the kernels themselves. Batches may be dynamic.

    Args:
        sums: [B, C] fp32, each sample's tokens summed.
        centers: [C, K], K up to 128.
        transforms: [K, S]; fp32, bf16 or fp16.
        tokens: how many were summed.

    Returns:
        [B, S] in ``transforms``' dtype.
    """
    batch, width = sums.shape
    num_centers, size = transforms.shape
    sums, centers, transforms = (t.contiguous() for t in (sums, centers, transforms))
    state = sums.new_empty(batch * (2 * num_centers + width + 1) + num_centers)
    block_k = block(num_centers)
    block_c = min(block(width), 16384 // block_k)
    wrap_triton(attend_kernel)[(batch,)](
        sums,
        centers,
        state,
        batch,
        tokens,
        width,
        tokens,  # in a tile: the sums of a sample are one
        1,
        num_centers=num_centers,
        BC=block_c,
        BK=block_k,
        BT=1 if tokens == 1 else 2,
        ONE_BLOCK=block_c >= width,
        PDL=False,
        num_warps=4,
    )
    mixed = transforms.new_empty(batch, size)
    rows, cols = 64, 64 if transforms.dtype == torch.float32 else 256
    wrap_triton(mix_kernel)[(ceil_div(size, cols), (batch + rows - 1) // rows)](
        state,
        transforms,
        mixed,
        None,
        batch,
        num_centers,
        size,
        BB=rows,
        BK=block_k,
        BS=cols,
        PDL=False,
        num_warps=4,
    )
    return mixed
