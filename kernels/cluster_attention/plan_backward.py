"""The backward of cluster attention, made of the launches of its kernels; kept as the forward's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..common.side_stream import Branch, mm
from . import launches_backward, launches_forward, launches_hopper
from .block_sizes import BlockSizes, block_sizes_for
from .padding import align, multiple_of_8, pad, unpad
from .problem import Arguments, Problem, ProjectionDtypes, Saved


class BackwardPlan:
    """The plan of a backward whose products are ours: of the gradients that are needed."""

    def __init__(self, problem: Problem, blocks: BlockSizes, needs: Arguments[bool]):
        batch, tokens, width, rank, num_centers, dtypes = problem
        self.need_down, self.need_up = needs.down_weight, needs.up_weight
        need_a = needs.x or needs.centers
        self.width, self.rank, self.padded = width, rank, bool(width % 8 or rank % 8)
        self.fit = pad if self.padded else align
        sizes: dict[str, Any] = {
            "batch": batch,
            "tokens": tokens,
            "width": multiple_of_8(width),
            "rank": multiple_of_8(rank),
            "dtype": dtypes.x,
            "blocks": blocks,
        }
        # Made and compiled only when z was not kept.
        self.restore_z = functools.cache(
            lambda: launches_forward.Transform(**(sizes | {"width": 0}), store_z=True)
        )
        hopper = blocks.groups > 0
        project = (
            launches_hopper.HopperProjectBackward if hopper else launches_backward.ProjectBackward
        )
        self.project = project(
            **sizes,
            sums=needs.up_bias,
            mix=needs.x or needs.down_weight or needs.down_bias,
            mixed_sums=needs.down_bias,
        )
        self.expand: Any = None
        self.outer = self.unmix = self.unattend = self.sums = None
        if needs.x:
            expand = (
                launches_hopper.HopperExpandBackward if hopper else launches_backward.ExpandBackward
            )
            self.expand = expand(**sizes)
        if need_a or needs.transforms:
            self.outer = launches_backward.Outer(
                batch=batch, tokens=tokens, rank=sizes["rank"], dtype=dtypes.x, blocks=blocks
            )
            self.unmix = _unmix(problem, blocks, needs, sizes["rank"])
        if need_a and self.unmix is not None:
            self.unattend = _unattend(problem, blocks, needs, self.unmix.programs)
        if needs.centers or needs.down_bias or needs.up_bias:
            self.sums = launches_backward.ParameterSums(
                batch=batch,
                width=width,
                num_centers=num_centers,
                rank=rank,
                centers_dtype=dtypes.centers,
                d_centers=dtypes.centers if needs.centers else None,
                d_up_bias=dtypes.up_bias if needs.up_bias else None,
                d_down_bias=dtypes.down_bias if needs.down_bias else None,
                blocks=blocks,
                up_rows=self.project.sum_rows if needs.up_bias else 0,
                down_rows=self.project.mixed_sum_rows if needs.down_bias else 0,
            )

    def __call__(
        self, g: Tensor, args: Arguments[Any], saved: Saved, weight_dtypes: ProjectionDtypes
    ) -> Arguments[Tensor | None]:
        """Return the gradients that are needed; see :func:`backward`."""
        fit, width, rank = self.fit, self.width, self.rank
        centers = args.centers.contiguous()
        transforms: Any = None
        down_weight: Any = None
        # Before the first kernel, as in the forward.
        if self.unmix is not None:
            transforms = fit(args.transforms, 2)
        if self.expand is not None:
            down_weight = fit(args.down_weight, 2)
        dx = d_centers = d_transforms = d_down = d_down_bias = d_up = d_up_bias = None
        da: Any = None
        ds: Any = None
        dq: Any = None

        # In an order that lets every intermediate go before the next large one comes.
        h, mixed, state, z = saved.take()
        branch = Branch(g.device)
        if self.need_up:
            if z is None or not z.numel():
                _, z, _ = self.restore_z()(h, mixed)
            d_up = branch.mm(_columns(g), z, weight_dtypes.up)
        del z
        gz, gh, up_sums, down_sums = self.project(fit(g, 1), fit(args.up_weight, 2), mixed)
        del mixed
        # What was written last is still in the L2 cache: G_b, its gradients, then gh twice.
        if self.outer is not None:
            d_mixed = self.outer(h, gz)
            del h, gz
        if self.need_down and branch.beside:  # beside the small kernels
            d_down = branch.mm(gh.t(), args.x.reshape(-1, width), weight_dtypes.down)
        if self.unmix is not None:
            d_transforms, da = self.unmix(d_mixed, state, transforms)
            del d_mixed
        if self.unattend is not None:
            ds, dq = self.unattend(da, state, centers)
        if self.sums is not None:
            if self.padded:
                up_sums = None if up_sums is None else unpad(up_sums, width)
                down_sums = None if down_sums is None else unpad(down_sums, rank)
            d_centers, d_up_bias, d_down_bias = self.sums(
                ds=ds, state=state, centers=centers, up_sums=up_sums, down_sums=down_sums
            )
        if self.need_down and d_down is None:
            d_down = branch.mm(gh.t(), args.x.reshape(-1, width), weight_dtypes.down)
        if self.expand is not None:
            dq = pad(dq, 1) if self.padded else dq
            dx = self.expand(gh, down_weight, dq)
        branch.join()
        if self.padded:
            dx = None if dx is None else unpad(dx, width)
            d_transforms = None if d_transforms is None else unpad(d_transforms, rank, 2)
            d_down = None if d_down is None else d_down[:rank].contiguous()
            d_up = None if d_up is None else d_up[:, :rank].contiguous()
        return Arguments(dx, d_centers, d_transforms, d_down, d_down_bias, d_up, d_up_bias)


backward_plan = functools.lru_cache(maxsize=1024)(BackwardPlan)


def _unmix(
    problem: Problem, blocks: BlockSizes, needs: Arguments[bool], rank: int
) -> launches_backward.Unmix:
    return launches_backward.Unmix(
        batch=problem.batch,
        num_centers=problem.num_centers,
        rank=rank,
        dtype=problem.dtypes.x,
        transforms_dtype=problem.dtypes.transforms,
        blocks=blocks,
        need_t=needs.transforms,
        need_a=needs.x or needs.centers,
    )


def _unattend(
    problem: Problem, blocks: BlockSizes, needs: Arguments[bool], programs: int
) -> launches_backward.Unattend:
    return launches_backward.Unattend(
        programs=programs,
        batch=problem.batch,
        tokens=problem.tokens,
        width=problem.width,
        num_centers=problem.num_centers,
        dtype=problem.dtypes.x,
        centers_dtype=problem.dtypes.centers,
        blocks=blocks,
        need_x=needs.x,
    )


class UnfusedBackwardPlan:
    """The plan of a backward in token mode or fp32: the products are cuBLAS's."""

    def __init__(self, problem: Problem, blocks: BlockSizes, needs: Arguments[bool]):
        self.problem, self.needs = problem, needs
        need_a = needs.x or needs.centers
        self.unmix = self.unattend = self.sums = None
        if need_a or needs.transforms:
            self.unmix = _unmix(problem, blocks, needs, problem.rank or problem.tokens)
        if need_a and self.unmix is not None:
            self.unattend = _unattend(problem, blocks, needs, self.unmix.programs)
        if needs.centers:
            self.sums = launches_backward.ParameterSums(
                batch=problem.batch,
                width=problem.width,
                num_centers=problem.num_centers,
                rank=0,
                centers_dtype=problem.dtypes.centers,
                d_centers=problem.dtypes.centers,
                d_up_bias=None,
                d_down_bias=None,
                blocks=blocks,
            )

    def __call__(
        self, g: Tensor, args: Arguments[Any], saved: Saved, weight_dtypes: ProjectionDtypes
    ) -> Arguments[Tensor | None]:
        """Return the gradients that are needed; see :func:`backward`."""
        problem, needs = self.problem, self.needs
        x, down_weight = args.x, args.down_weight
        h, mixed, state, z = saved.take()
        centers, transforms = args.centers.contiguous(), args.transforms.contiguous()
        dx = d_centers = d_transforms = d_down = d_down_bias = d_up = d_up_bias = None
        dq: Any = None
        if down_weight is not None:
            h = h.view(problem.batch, problem.tokens, -1)
            gz = g @ args.up_weight
            if needs.up_weight:
                if z is None or not z.numel():
                    z = torch.bmm(h, mixed).flatten(0, 1)
                d_up = mm(g.flatten(0, 1).t(), z, weight_dtypes.up)
                del z
            if needs.up_bias:
                d_up_bias = g.sum((0, 1)).to(problem.dtypes.up_bias)
            gh = torch.bmm(gz, mixed.transpose(1, 2))
            if needs.down_weight:
                d_down = mm(gh.flatten(0, 1).t(), x.flatten(0, 1), weight_dtypes.down)
            if needs.down_bias:
                d_down_bias = gh.sum((0, 1)).to(problem.dtypes.down_bias)
        if self.unmix is not None:
            d_mixed = torch.bmm(g, x.mT) if down_weight is None else torch.bmm(h.mT, gz)
            d_transforms, da = self.unmix(d_mixed, state, transforms)
            del d_mixed
        if self.unattend is not None:
            ds, dq = self.unattend(da, state, centers)
        if self.sums is not None:
            d_centers, _, _ = self.sums(ds=ds, state=state, centers=centers)
        if needs.x:
            dx = torch.bmm(mixed.mT, g) if down_weight is None else gh @ down_weight
            dx += dq.to(dx.dtype).unsqueeze(1)
        return Arguments(dx, d_centers, d_transforms, d_down, d_down_bias, d_up, d_up_bias)


unfused_backward_plan = functools.lru_cache(maxsize=1024)(UnfusedBackwardPlan)


def backward(
    problem: Problem,
    g: Tensor,
    needs: Arguments[bool],
    args: Arguments[Any],
    saved: Saved,
    weight_dtypes: ProjectionDtypes,
) -> Arguments[Tensor | None]:
    """Compute the gradients of the forward's arguments, ``None`` where ``needs`` has none.

    Args:
        problem: of the forward's arguments.
        g: [B, N, C], the gradient of y.
        needs: which gradients.
        args: the forward's; the biases are not read.
        saved: what it returned beside y; it is emptied.
        weight_dtypes: of the gradients of both weights.
    """
    if problem.fused:
        fused = backward_plan(problem, block_sizes_for(args.x, problem.rank), needs)
        return fused(g, args, saved, weight_dtypes)
    plan = unfused_backward_plan(problem, block_sizes_for(args.x, 16), needs)
    return plan(g, args, saved, weight_dtypes)


def _columns(t: Tensor) -> Tensor:
    """Return t [B, N, C] as [C, B·N]: one view where it is contiguous, else two."""
    rows, width = t.shape[0] * t.shape[1], t.shape[2]
    if t.is_contiguous():
        return t.as_strided((width, rows), (1, width))
    return t.reshape(rows, width).t()
