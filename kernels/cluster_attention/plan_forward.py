"""The forward of cluster attention, made of the launches of its kernels.

For each problem there is a plan: its launches, prepared with the first call and kept. A call
brings its tensors.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import launches_forward, launches_hopper
from .block_sizes import BlockSizes, block_sizes_for
from .padding import align, multiple_of_8, pad, unpad
from .plan_backward import backward_plan, unfused_backward_plan
from .problem import Arguments, Problem, Saved


class ForwardPlan:
    """The plan of a forward whose products are ours; ``needs`` is its backward's."""

    def __init__(self, problem: Problem, blocks: BlockSizes, save_z: bool, needs: Arguments[bool]):
        batch, tokens, width, rank, num_centers, dtypes = problem
        self.width, self.padded = width, bool(width % 8 or rank % 8)
        self.fit = pad if self.padded else align
        width_8, rank_8 = multiple_of_8(width), multiple_of_8(rank)
        # They compile in this order: what takes longest begins, the backward's are last.
        hopper = blocks.groups > 0
        transform = launches_hopper.HopperTransform if hopper else launches_forward.Transform
        self.transform = transform(
            batch=batch,
            tokens=tokens,
            rank=rank_8,
            width=width_8,
            dtype=dtypes.x,
            blocks=blocks,
            store_z=save_z,
            bias=dtypes.up_bias,
        )
        sizes: dict[str, Any] = {
            "rows": batch * tokens,
            "tokens": tokens,
            "width": width_8,
            "rank": rank_8,
            "dtype": dtypes.x,
            "blocks": blocks,
            "bias": dtypes.down_bias,
        }
        self.project: launches_hopper.HopperProject | launches_forward.Project
        if hopper:
            self.project = launches_hopper.HopperProject(**sizes)
        else:
            self.project = launches_forward.Project(**sizes, sums=True)
        self.attend = launches_forward.Attend(
            batch=batch,
            tokens=tokens,
            width=width,
            num_centers=num_centers,
            dtype=dtypes.centers,
            tile_rows=self.project.tile_rows,
            slots=self.project.slots,
            blocks=blocks,
        )
        self.mix = launches_forward.Mix(
            batch=batch,
            num_centers=num_centers,
            rank=rank_8,
            dtype=dtypes.x,
            transforms_dtype=dtypes.transforms,
            blocks=blocks,
        )
        if any(needs):
            backward_plan(problem, blocks, needs)

    def __call__(self, args: Arguments[Any]) -> tuple[Tensor, Saved]:
        """Return y [B, N, C] and what the backward needs."""
        fit = self.fit
        x = fit(args.x, 1)
        # Before the first kernel: the others read parameters before they wait for what is before.
        centers, transforms = args.centers.contiguous(), fit(args.transforms, 2)
        up_weight = fit(args.up_weight, 2)
        down_bias = None if args.down_bias is None else fit(args.down_bias, 1)
        h, sums = self.project(x, fit(args.down_weight, 2), down_bias)
        if self.padded:
            sums = unpad(sums, self.width)
        state = self.attend(sums, centers)
        mixed = self.mix(state, transforms)
        up_bias = None if args.up_bias is None else fit(args.up_bias, 1)
        y, z, _ = self.transform(h, mixed, up_weight, up_bias)
        return unpad(y, self.width) if self.padded else y, Saved(h, mixed, state, z)


forward_plan = functools.lru_cache(maxsize=1024)(ForwardPlan)


class UnfusedForwardPlan:
    """The plan of a forward in token mode or fp32: attention and mixing are ours."""

    def __init__(self, problem: Problem, blocks: BlockSizes, needs: Arguments[bool]):
        batch, tokens, width, rank, num_centers, dtypes = problem
        self.attend = launches_forward.Attend(
            batch=batch,
            tokens=tokens,
            width=width,
            num_centers=num_centers,
            dtype=dtypes.centers,
            tile_rows=tokens,
            slots=1,
            blocks=blocks,
        )
        self.mix = launches_forward.Mix(
            batch=batch,
            num_centers=num_centers,
            rank=rank or tokens,
            dtype=dtypes.x,
            transforms_dtype=dtypes.transforms,
            blocks=blocks,
        )
        if any(needs):
            unfused_backward_plan(problem, blocks, needs)

    def __call__(self, args: Arguments[Any], save_z: bool) -> tuple[Tensor, Saved]:
        """Return y [B, N, C] and what the backward needs."""
        x = args.x
        # Before the first kernel, as in ForwardPlan.
        centers, transforms = args.centers.contiguous(), args.transforms.contiguous()
        sums = x.sum(1, dtype=torch.float32)
        state = self.attend(sums, centers)
        mixed = self.mix(state, transforms)
        if args.down_weight is None:
            return torch.bmm(mixed, x), Saved(None, mixed, state, None)
        h = F.linear(x, args.down_weight, args.down_bias)
        z = torch.bmm(h, mixed)
        y = F.linear(z, args.up_weight, args.up_bias)
        return y, Saved(h.flatten(0, 1), mixed, state, z.flatten(0, 1) if save_z else None)


unfused_forward_plan = functools.lru_cache(maxsize=1024)(UnfusedForwardPlan)


def forward(
    problem: Problem, args: Arguments[Any], *, save_z: bool, needs: Arguments[bool]
) -> tuple[Tensor, Saved]:
    """Compute cluster attention.

    Args:
        problem: of the arguments.
        args: x [B, N, C] and the weights have one dtype, the rest any.
        save_z: keep z for the gradient of ``up_weight``.
        needs: for which of them a backward will ask; its kernels compile in the meantime.

    Returns:
        y [B, N, C], and what the backward needs.
    """
    if problem.fused:
        return forward_plan(problem, block_sizes_for(args.x, problem.rank), save_z, needs)(args)
    return unfused_forward_plan(problem, block_sizes_for(args.x, 16), needs)(args, save_z)
