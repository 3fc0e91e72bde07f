"""Forward and backward of cluster attention, made of the launches of its kernels.

For each problem there is a plan: its launches, prepared with the first call and kept. A call
brings its tensors.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.side_stream import Branch, mm
from . import config as configs
from . import launches
from .config import Config


class Problem(NamedTuple):
    """What the plans of a call depend on, beside its configuration."""

    batch: int
    tokens: int
    width: int
    rank: int  # 0 in token mode
    num_centers: int
    dtypes: tuple[torch.dtype | None, ...]  # of the arguments


def problem_of(args) -> Problem:
    """The problem that the arguments of ``forward`` pose."""
    x, centers, _, down_weight = args[:4]
    rank = 0 if down_weight is None else down_weight.shape[0]
    dtypes = tuple([None if t is None else t.dtype for t in args])
    return Problem(*x.shape, rank, centers.shape[1], dtypes)


def _fused(problem: Problem) -> bool:
    """Whether the products are ours; in token mode and in fp32 they are cuBLAS's."""
    return problem.rank > 0 and problem.dtypes[0] != torch.float32


_NOTHING = (False,) * 7


def forward(problem: Problem, args, *, save_z: bool, needs: tuple[bool, ...] = _NOTHING):
    """Cluster attention.

    Args:
        args: x, centers, transforms, down_weight, down_bias, up_weight, up_bias; x [B, N, C] and
            the projections have one dtype, the rest any.
        needs: for which of them a backward will ask; its kernels compile in the meantime.

    Returns:
        y [B, N, C], and what the backward needs: h [B·N, R] (``None`` in token mode), T_b
        [B, R, R], the state of ``attend`` and, if ``save_z``, h @ T_b [B·N, R] (else ``None``).
    """
    if not _fused(problem):
        return _forward_unfused(problem, args, save_z, needs)
    config = configs.config_for(args[0], problem.rank)
    return _forward_plan(problem, config, save_z, needs)(*args)


def backward(
    problem: Problem,
    g: Tensor,
    needs,
    args,
    saved: list[Tensor | None],
    weight_dtypes: tuple[torch.dtype | None, torch.dtype | None] = (None, None),
):
    """Gradients of ``forward`` in the order of its arguments, ``None`` where ``needs`` has none.

    Args:
        g: [B, N, C], the gradient of y.
        needs: seven booleans.
        args: of ``forward``, without the biases.
        saved: what it returned beside y, as a list; it is emptied.
        weight_dtypes: of the gradients of ``down_weight`` and ``up_weight``; theirs if ``None``.
    """
    if not _fused(problem):
        return _backward_unfused(problem, g, needs, args, saved, weight_dtypes)
    config = configs.config_for(args[0], problem.rank)
    return _backward_plan(problem, config, tuple(needs))(g, args, saved, weight_dtypes)


class _Forward:
    """The plan of a forward whose products are ours; ``needs`` is its backward's."""

    def __init__(self, problem: Problem, config: Config, save_z: bool, needs: tuple[bool, ...]):
        batch, tokens, width, rank, num_centers, dtypes = problem
        dtype = dtypes[0]
        self.width, self.padded = width, bool(width % 8 or rank % 8)
        self.fit = _pad if self.padded else _aligned
        sizes = (_multiple(width), _multiple(rank))
        # They compile in this order: what takes longest begins, the backward's are last.
        self.transform = launches.transform(
            batch,
            tokens,
            *reversed(sizes),
            dtype,
            config,
            store_z=save_z,
            bias=dtypes[6],
        )
        self.project = launches.project(
            batch * tokens,
            tokens,
            *sizes,
            dtype,
            config,
            bias=dtypes[4],
            sums=True,
        )
        tile = (self.project.tile_rows, self.project.slots)
        self.attend = launches.Attend(batch, tokens, width, num_centers, dtypes[1], *tile, config)
        self.mix = launches.Mix(batch, num_centers, sizes[1], dtype, dtypes[2], config)
        if any(needs):
            _backward_plan(problem, config, needs)

    def __call__(self, x, centers, transforms, down_weight, down_bias, up_weight, up_bias):
        fit = self.fit
        x = fit(x, 1)
        # Before the first kernel: the others read parameters before they wait for what is before.
        centers, transforms, up_weight = centers.contiguous(), fit(transforms, 2), fit(up_weight, 2)
        down_bias = None if down_bias is None else fit(down_bias, 1)
        h, _, sums, _ = self.project(x, fit(down_weight, 2), down_bias, None)
        if self.padded:
            sums = _unpad(sums, self.width)
        state = self.attend(sums, centers)
        mixed = self.mix(state, transforms)
        up_bias = None if up_bias is None else fit(up_bias, 1)
        y, z, _ = self.transform(h, mixed, up_weight, up_bias)
        return _unpad(y, self.width) if self.padded else y, (h, mixed, state, z)


_forward_plan = functools.lru_cache(maxsize=1024)(_Forward)


class _Backward:
    """The plan of a backward whose products are ours: of the gradients that are needed."""

    def __init__(self, problem: Problem, config: Config, needs: tuple[bool, ...]):
        batch, tokens, width, rank, num_centers, dtypes = problem
        dtype = dtypes[0]
        need_x, need_centers, need_t, need_down, need_down_bias, need_up, need_up_bias = needs
        need_a = need_x or need_centers
        rows = batch * tokens
        self.width, self.rank, self.padded = width, rank, bool(width % 8 or rank % 8)
        self.fit = _pad if self.padded else _aligned
        self.need_down, self.need_up = need_down, need_up
        sizes = (_multiple(width), _multiple(rank))
        # Made and compiled only when z was not kept.
        self.restore_z = functools.cache(
            lambda: launches.transform(batch, tokens, sizes[1], 0, dtype, config, store_z=True)
        )
        self.project = launches.project(
            rows,
            rows,
            *sizes,
            dtype,
            config,
            transposed=True,
            sums=need_up_bias,
            mix=batch if need_x or need_down or need_down_bias else 0,
            mixed_sums=need_down_bias,
        )
        self.outer = self.unmix = self.unattend = self.reduce = self.transform = None
        if need_x:
            self.transform = launches.transform(
                batch,
                tokens,
                *reversed(sizes),
                dtype,
                config,
                mix=False,
                w_transposed=True,
                bias=dtype,
                row_bias=True,
            )
        if need_a or need_t:
            self.outer = launches.Outer(batch, tokens, sizes[1], dtype, config)
            self.unmix = launches.Unmix(
                batch,
                num_centers,
                sizes[1],
                dtype,
                dtypes[2],
                config,
                need_t=need_t,
                need_a=need_a,
            )
        if need_a:
            self.unattend = launches.Unattend(
                self.unmix.programs,
                batch,
                tokens,
                width,
                num_centers,
                dtype,
                dtypes[1],
                config,
                need_x=need_x,
            )
        if need_centers or need_down_bias or need_up_bias:
            asked = ((1, need_centers), (6, need_up_bias), (4, need_down_bias))
            self.reduce = launches.Reduce(
                batch,
                width,
                num_centers,
                rank,
                dtypes[1],
                [dtypes[i] if need else None for i, need in asked],
                config,
                up_rows=self.project.sum_rows if need_up_bias else 0,
                down_rows=self.project.mixed_sum_rows if need_down_bias else 0,
            )

    def __call__(self, g, args, saved, weight_dtypes):
        x, centers, transforms, down_weight, up_weight = args
        down_dtype, up_dtype = weight_dtypes
        fit, width, rank = self.fit, self.width, self.rank
        centers = centers.contiguous()
        # Before the first kernel, as in the forward.
        if self.unmix is not None:
            transforms = fit(transforms, 2)
        if self.transform is not None:
            down_weight = fit(down_weight, 2)
        dx = d_centers = d_transforms = d_down = d_down_bias = d_up = d_up_bias = None
        da = ds = dq = None

        # In an order that lets every intermediate go before the next large one comes.
        h, mixed, state, z = saved
        saved.clear()
        branch = Branch(g.device)
        if self.need_up:
            if z is None or not z.numel():
                _, z, _ = self.restore_z()(h, mixed, None, None)
            d_up = branch.mm(_columns(g), z, up_dtype)
        del z
        gz, gh, up_sums, down_sums = self.project(fit(g, 1), fit(up_weight, 2), None, mixed)
        del mixed
        # What was written last is still in the L2 cache: G_b, its gradients, then gh twice.
        if self.outer is not None:
            d_mixed = self.outer(h, gz)
            del h, gz
        if self.need_down and branch.beside:  # beside the small kernels
            d_down = branch.mm(gh.t(), x.reshape(-1, width), down_dtype)
        if self.unmix is not None:
            d_transforms, da = self.unmix(d_mixed, state, transforms)
            del d_mixed
        if self.unattend is not None:
            ds, dq = self.unattend(da, state, centers)
        if self.reduce is not None:
            if self.padded:
                up_sums = None if up_sums is None else _unpad(up_sums, width)
                down_sums = None if down_sums is None else _unpad(down_sums, rank)
            sums = (up_sums, down_sums)
            d_centers, d_up_bias, d_down_bias = self.reduce(ds, state, centers, *sums)
        if self.need_down and d_down is None:
            d_down = branch.mm(gh.t(), x.reshape(-1, width), down_dtype)
        if self.transform is not None:
            dq = _pad(dq, 1) if self.padded else dq
            dx, _, _ = self.transform(gh, None, down_weight, dq)
        branch.join()
        if self.padded:
            dx = None if dx is None else _unpad(dx, width)
            d_transforms = None if d_transforms is None else _unpad(d_transforms, rank, 2)
            d_down = None if d_down is None else d_down[:rank].contiguous()
            d_up = None if d_up is None else d_up[:, :rank].contiguous()
        return dx, d_centers, d_transforms, d_down, d_down_bias, d_up, d_up_bias


_backward_plan = functools.lru_cache(maxsize=1024)(_Backward)


# Token mode and fp32: the products are cuBLAS's, attention and mixing ours.


class _Unfused:
    """The launches of both passes; of the backward's those that ``needs`` asks for."""

    def __init__(self, problem: Problem, config: Config, needs: tuple[bool, ...]):
        batch, tokens, width, rank, num_centers, dtypes = problem
        need_x, need_centers, need_transforms = needs[:3]
        need_a = need_x or need_centers
        dtype = dtypes[0]
        size = rank or tokens
        self.attend = launches.Attend(
            batch, tokens, width, num_centers, dtypes[1], tokens, 1, config
        )
        self.mix = launches.Mix(batch, num_centers, size, dtype, dtypes[2], config)
        self.unmix = self.unattend = self.reduce = None
        if need_a or need_transforms:
            self.unmix = launches.Unmix(
                batch,
                num_centers,
                size,
                dtype,
                dtypes[2],
                config,
                need_t=need_transforms,
                need_a=need_a,
            )
        if need_a:
            programs = self.unmix.programs
            sizes = (batch, tokens, width, num_centers)
            self.unattend = launches.Unattend(
                programs, *sizes, dtype, dtypes[1], config, need_x=need_x
            )
        if need_centers:
            wanted = (dtypes[1], None, None)
            self.reduce = launches.Reduce(batch, width, num_centers, 0, dtypes[1], wanted, config)


_unfused_plan = functools.lru_cache(maxsize=1024)(_Unfused)


def _forward_unfused(problem: Problem, args, save_z: bool, needs: tuple[bool, ...]):
    x, centers, transforms, down_weight, down_bias, up_weight, up_bias = args
    plan = _unfused_plan(problem, configs.config_for(x, 16), needs)
    # Before the first kernel, as in _Forward.
    centers, transforms = centers.contiguous(), transforms.contiguous()
    sums = x.sum(1, dtype=torch.float32)
    state = plan.attend(sums, centers)
    mixed = plan.mix(state, transforms)
    if down_weight is None:
        return torch.bmm(mixed, x), (None, mixed, state, None)
    h = F.linear(x, down_weight, down_bias)
    z = torch.bmm(h, mixed)
    y = F.linear(z, up_weight, up_bias)
    return y, (h.flatten(0, 1), mixed, state, z.flatten(0, 1) if save_z else None)


def _backward_unfused(problem: Problem, g, needs, args, saved, weight_dtypes):
    x, centers, transforms, down_weight, up_weight = args
    h, mixed, state, z = saved
    saved.clear()
    need_x, _, _, need_down, need_down_bias, need_up, need_up_bias = needs
    plan = _unfused_plan(problem, configs.config_for(x, 16), tuple(needs))
    centers, transforms = centers.contiguous(), transforms.contiguous()
    dx = d_centers = d_transforms = d_down = d_down_bias = d_up = d_up_bias = dq = None
    if down_weight is not None:
        h = h.view(problem.batch, problem.tokens, -1)
        gz = g @ up_weight
        if need_up:
            if z is None or not z.numel():
                z = torch.bmm(h, mixed).flatten(0, 1)
            d_up = mm(g.flatten(0, 1).t(), z, weight_dtypes[1])
            del z
        if need_up_bias:
            d_up_bias = g.sum((0, 1)).to(problem.dtypes[6])
        gh = torch.bmm(gz, mixed.transpose(1, 2))
        if need_down:
            d_down = mm(gh.flatten(0, 1).t(), x.flatten(0, 1), weight_dtypes[0])
        if need_down_bias:
            d_down_bias = gh.sum((0, 1)).to(problem.dtypes[4])
    if plan.unmix is not None:
        d_mixed = torch.bmm(g, x.mT) if down_weight is None else torch.bmm(h.mT, gz)
        d_transforms, da = plan.unmix(d_mixed, state, transforms)
        del d_mixed
    if plan.unattend is not None:
        ds, dq = plan.unattend(da, state, centers)
    if plan.reduce is not None:
        d_centers, _, _ = plan.reduce(ds, state, centers, None, None)
    if need_x:
        dx = torch.bmm(mixed.mT, g) if down_weight is None else gh @ down_weight
        dx += dq.to(dx.dtype).unsqueeze(1)
    return dx, d_centers, d_transforms, d_down, d_down_bias, d_up, d_up_bias


def _columns(t: Tensor) -> Tensor:
    """t [B, N, C] as [C, B·N]: one view where it is contiguous, else two."""
    rows, width = t.shape[0] * t.shape[1], t.shape[2]
    if t.is_contiguous():
        return t.as_strided((width, rows), (1, width))
    return t.reshape(rows, width).t()


# The bulk copies need aligned rows of whole 16 bytes: other widths are padded with zeros, which
# change nothing, and cut off again.


def _multiple(n: int) -> int:
    return ceil_div(n, 8) * 8


def _aligned(t: Tensor, dims: int) -> Tensor:
    """t contiguous and aligned."""
    t = t if t.is_contiguous() else t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _pad(t: Tensor, dims: int) -> Tensor:
    """The same, its last ``dims`` dimensions padded to multiples of 8."""
    pad = [-n % 8 for n in t.shape[: -dims - 1 : -1]]
    if any(pad):
        return F.pad(t, [p for n in pad for p in (0, n)])
    return _aligned(t, dims)


def _unpad(t: Tensor, width: int, dims: int = 1) -> Tensor:
    if t.shape[-1] == width:
        return t
    return (t[..., :width] if dims == 1 else t[..., :width, :width]).contiguous()
