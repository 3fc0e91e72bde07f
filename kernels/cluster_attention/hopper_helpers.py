"""Parts of the Hopper kernels that the forward and the backward share.

A program has one to three groups of four warps, each with 64 rows of its own. They share a ring
buffer of weight tiles, 64 columns wide. The first group is the producer for all of them and refills
a slot as soon as every group has arrived at its empty barrier; otherwise the groups run free of
each other: while one stores its output, the others keep the tensor cores busy. The launch chooses
as many groups as make the fewest waves. There is no warp that only copies: with it, a third group
would leave every thread 128 registers, fewer than its accumulators take.

Shapes are named as in :mod:`fastadapt.kernels.cluster_attention.reference`; ``rows`` is B·N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.gluon_hopper import accumulator_layout, halves, load, store, view, wait_for


@gluon.jit
def store_tile(t, row, col, desc, smem, PENDING: gl.constexpr):
    """Store t through smem, of which ``PENDING`` other stores may not have been read yet.

    A descriptor [B, N, C] takes the rows from a sample's first on, up to its last.
    """
    tma.store_wait(PENDING)
    smem.store(t)
    fence_async_shared()
    if len(desc.block_type.shape) == 2:
        store(desc, [row, col], smem)
    else:
        whole = view(smem, desc.dtype, [1, 64, 64], desc.layout)
        store(desc, [row // desc.shape[1], 0, col], whole)


# The projection: rows [rows, C] times a weight, and in the backward through T_bᵀ.


@dataclass(frozen=True)
class ProjectVariant:
    """The compile-time parameters of a projection kernel."""

    rank: int  # 64, 128 or 256
    groups: int
    stages: int  # of the ring buffer; at least rank / 64, at most 3 of them
    slots: int  # samples that 64 rows may belong to: 8 or 16
    transposed: bool  # the weight is [C, R]
    bias: bool
    sums: bool
    mix: bool  # also out @ T_bᵀ
    mixed_sums: bool


class ProjectArguments(NamedTuple):
    """The tensors, barriers and sizes that the groups of a projection kernel share."""

    x_desc: Any  # [rows, C]
    w_desc: Any  # [R, C] or, transposed, [C, R]
    t_desc: Any  # [B·R, R], or None
    out_desc: Any  # [rows, R]
    mixed_desc: Any  # [rows, R], or None
    bias_ptr: Any  # [R], or None
    sums_ptr: Any  # [row blocks of 64, slots, C], or None
    mixed_sums_ptr: Any  # [row blocks of 64, R], or None
    x_ring: Any  # [groups · stages, 64, 64]
    w_ring: Any  # [stages, 64, R] or [stages, R, 64]
    hot_smem: Any  # [groups, slots, 64]
    full_bars: Any
    empty_bars: Any
    rows: Any
    width: Any
    tokens: Any  # rows of a sample of the sums
    slots: Any
    mix_tokens: Any  # rows of a sample of T_b
    first_row: Any  # of the program
    steps: Any  # items of the ring that hold tiles of x and of the weight
    items: Any  # of the ring, with the tiles of T_b
    samples: Any  # of which the program has rows
    first_sample: Any


@gluon.jit
def fill_project(i, p, v: gl.constexpr):
    """Start the copies of item i: a tile of x and of the weight, then tiles of T_b."""
    slot = i % v.stages
    full = p.full_bars.index(slot)
    if i < p.steps:
        mbarrier.expect(full, (64 * v.groups + v.rank) * 64 * 2)
        for group in gl.static_range(gl.constexpr(v.groups)):
            x_slot = p.x_ring.index(v.groups * slot + group)
            load(p.x_desc, [p.first_row + 64 * group, i * 64], full, x_slot)
        if v.transposed:
            load(p.w_desc, [i * 64, 0], full, p.w_ring.index(slot))
        else:
            load(p.w_desc, [0, i * 64], full, p.w_ring.index(slot))
    elif v.mix:
        n = (i - p.steps) // p.samples
        sample = p.first_sample + (i - p.steps) % p.samples
        mbarrier.expect(full, v.rank * 64 * 2)
        load(p.t_desc, [sample * v.rank + n * 64, 0], full, p.w_ring.index(slot))


@gluon.jit
def refill_project(i, group: gl.constexpr, p, v: gl.constexpr):
    """Have the first group refill the slot of item i once all groups have released it."""
    if group == 0 and i >= 0 and i + v.stages < p.items:
        wait_for(p.empty_bars, i, v)
        fill_project(i + v.stages, p, v)


@gluon.jit
def project_rows(group: gl.constexpr, unit, p, v: gl.constexpr):
    """Multiply a group's 64 rows of x with the weight, add the bias and store the result.

    Args:
        group: the group's number.
        unit: the number of its block of rows.
        p: :class:`ProjectArguments`.
        v: :class:`ProjectVariant`.

    Returns:
        The product [64, R] in the output's dtype.
    """
    dtype: gl.constexpr = p.out_desc.dtype
    BR: gl.constexpr = v.rank
    BS: gl.constexpr = v.slots
    layout: gl.constexpr = accumulator_layout(BR)
    s_layout: gl.constexpr = accumulator_layout(BS)
    hot_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = unit * 64
    if group == 0:
        for i in gl.static_range(gl.constexpr(v.stages)):
            if i < p.items:
                fill_project(i, p, v)
    if v.sums:
        # Summing rows is a product with the one-hot matrix "row belongs to the s-th sample".
        first = row // p.tokens
        present = (gl.minimum(row + 64, p.rows) - 1) // p.tokens - first + 1
        o_h = gl.arange(0, 64, layout=gl.SliceLayout(0, hot_layout))
        o_t = gl.arange(0, BS, layout=gl.SliceLayout(1, hot_layout))
        hot = o_t[:, None] == ((row + o_h) // p.tokens - first)[None, :]
        p.hot_smem.index(group).store(hot.to(dtype))
        fence_async_shared()
        hot_t = p.hot_smem.index(group).permute((1, 0))
        o_c = gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        o_s = gl.arange(0, BS, layout=gl.SliceLayout(0, s_layout))
        p_sums = p.sums_ptr + gl.cast(unit, gl.int64) * p.slots * p.width
        o_sums = o_c[:, None] + (o_s * p.width)[None, :]
        no_sums = gl.zeros([64, BS], gl.float32, s_layout)
    acc = gl.zeros([64, BR], gl.float32, layout)
    for i in range(p.steps):
        wait_for(p.full_bars, i, v)
        x = p.x_ring.index(v.groups * (i % v.stages) + group)
        w = p.w_ring.index(i % v.stages)
        if not v.transposed:
            w = w.permute((1, 0))
        if v.sums:
            sums = warpgroup_mma(x.permute((1, 0)), hot_t, no_sums, use_acc=False, is_async=True)
        acc = warpgroup_mma(x, w, acc, is_async=True)
        refill_project(i - 1, group, p, v)
        if v.sums:
            # They are stored while the larger product runs.
            sums = warpgroup_mma_wait(1, [sums])
            m_sums = (o_s < present)[None, :] & (i * 64 + o_c < p.width)[:, None]
            gl.store(p_sums + (o_sums + i * 64), sums, mask=m_sums)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(p.empty_bars.index(i % v.stages), count=1)
    if v.bias:
        o_r = gl.arange(0, BR, layout=gl.SliceLayout(0, layout))
        acc += gl.load(p.bias_ptr + o_r).to(gl.float32)[None, :]
    out = acc.to(dtype)
    # The group's own slots of x are free: they carry its output by 64 columns.
    if BR == 64:
        store_tile(out, row, 0, p.out_desc, p.x_ring.index(group), 0)
    elif BR == 128:
        left, right = halves(out)
        store_tile(left, row, 0, p.out_desc, p.x_ring.index(group), 0)
        store_tile(right, row, 64, p.out_desc, p.x_ring.index(v.groups + group), 1)
    else:
        left, right = halves(out)
        t0, t1 = halves(left)
        t2, t3 = halves(right)
        store_tile(t0, row, 0, p.out_desc, p.x_ring.index(group), 0)
        store_tile(t1, row, 64, p.out_desc, p.x_ring.index(v.groups + group), 1)
        store_tile(t2, row, 128, p.out_desc, p.x_ring.index(2 * v.groups + group), 2)
        store_tile(t3, row, 192, p.out_desc, p.x_ring.index(group), 2)
    return out


# The output: z [rows, R] times a weight, with biases.


@dataclass(frozen=True)
class ExpandVariant:
    """The compile-time parameters of an expanding kernel, one that ends with a product [R, C]."""

    rank: int  # 64, 128 or 256
    groups: int
    stages: int  # of the ring buffer
    mix: bool  # z = h @ T_b, or z = h
    store_z: bool
    w_transposed: bool  # the weight is [R, C]
    biases: int  # blocks of biases that a tile needs: none, one, or with row_bias one a group
    row_bias: bool  # every sample has a bias of its own
    aligned: bool  # every group has one sample, of up to 64 tokens, instead of 64 rows


class ExpandArguments(NamedTuple):
    """The tensors, barriers and sizes that the groups of an expanding kernel share."""

    h_desc: Any  # [rows, R]
    t_desc: Any  # [B·R, R], or None
    w_desc: Any  # [C, R] or, transposed, [R, C]
    z_desc: Any  # [rows, R] or aligned [B, N, R], or None
    y_desc: Any  # [rows, C] or aligned [B, N, C]
    bias_desc: Any  # [1, C] or [B, C], or None
    h_smem: Any  # [groups · R / 64, 64, 64]
    ring: Any  # [stages, R, 64]
    bias_ring: Any  # [stages · biases, 16, 64]
    h_full: Any
    full_bars: Any
    empty_bars: Any
    rows: Any
    tokens: Any
    width: Any
    first_row: Any  # of the program
    t_items: Any  # items of the ring that hold tiles of T_b
    items: Any  # of the ring, with the tiles of the weight
    first_sample: Any
    samples: Any  # of which the program has rows


@gluon.jit
def fill_expand(i, p, v: gl.constexpr):
    """Start the copies of item i: a tile of T_b, of all samples in turn, then of the weight."""
    slot = i % v.stages
    full = p.full_bars.index(slot)
    if v.mix and i < p.t_items:
        mbarrier.expect(full, 64 * v.rank * 2)
        sample = p.first_sample + i // (v.rank // 64)
        load(p.t_desc, [sample * v.rank, i % (v.rank // 64) * 64], full, p.ring.index(slot))
    else:
        c = (i - p.t_items) * 64
        mbarrier.expect(full, (v.rank + 16 * v.biases) * 64 * 2)
        if v.w_transposed:
            load(p.w_desc, [0, c], full, p.ring.index(slot))
        else:
            w = view(p.ring.index(slot), p.w_desc.dtype, [64, v.rank], p.w_desc.layout)
            load(p.w_desc, [c, 0], full, w)
        for j in gl.static_range(gl.constexpr(v.biases)):
            sample = (p.first_row + 64 * j) // p.tokens if v.row_bias else 0
            load(p.bias_desc, [sample, c], full, p.bias_ring.index(v.biases * slot + j))


@gluon.jit
def refill_expand(i, group: gl.constexpr, p, v: gl.constexpr):
    """Have the first group refill the slot of item i once all groups have released it."""
    if group == 0 and i >= 0 and i + v.stages < p.items:
        wait_for(p.empty_bars, i, v)
        fill_expand(i + v.stages, p, v)


@gluon.jit
def load_rows(group: gl.constexpr, row, height, p, v: gl.constexpr):
    """Have the first group load all rows of h and fill the ring buffer; wait for h."""
    CHUNKS: gl.constexpr = v.rank // 64
    if group == 0:
        mbarrier.expect(p.h_full, v.groups * 64 * v.rank * 2)
        for n in gl.static_range(gl.constexpr(v.groups * CHUNKS)):
            where = [row + n // CHUNKS * height, n % CHUNKS * 64]
            load(p.h_desc, where, p.h_full, p.h_smem.index(n))
        for i in gl.static_range(gl.constexpr(v.stages)):
            if i < p.items:
                fill_expand(i, p, v)
    mbarrier.wait(p.h_full, 0)


@gluon.jit
def product(a0, a1, a2, a3, w, acc, USE_ACC: gl.constexpr, v: gl.constexpr):
    """Start a @ w, a in chunks of 64 columns."""
    acc = warpgroup_mma(a0, w.slice(0, 64), acc, use_acc=USE_ACC, is_async=True)
    if v.rank > 64:
        acc = warpgroup_mma(a1, w.slice(64, 64), acc, is_async=True)
    if v.rank > 128:
        acc = warpgroup_mma(a2, w.slice(128, 64), acc, is_async=True)
        acc = warpgroup_mma(a3, w.slice(192, 64), acc, is_async=True)
    return acc


@gluon.jit
def expand_rows(group: gl.constexpr, i, z0, z1, z2, z3, row, first, p, v: gl.constexpr):
    """Multiply a group's rows of z with the weight from item i on, add biases and store y.

    Args:
        group: the group's number.
        i: the first item of the ring with a tile of the weight.
        z0, z1, z2, z3: z in chunks of 64 columns, as first operands.
        row: the group's first row.
        first: that row's sample.
        p: :class:`ExpandArguments`.
        v: :class:`ExpandVariant`.
    """
    dtype: gl.constexpr = p.y_desc.dtype
    CHUNKS: gl.constexpr = v.rank // 64
    layout: gl.constexpr = accumulator_layout(64)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    zeros = gl.zeros([64, 64], gl.float32, layout)
    # Adding biases is a product, too, with the one-hot matrix "row has the s-th of 16 biases".
    o_row = gl.arange(0, 64, layout=gl.SliceLayout(1, a_layout))
    o_s = gl.arange(0, 16, layout=gl.SliceLayout(0, a_layout))
    of_row = (row + o_row) // p.tokens - first if v.row_bias else o_row * 0
    hot = (of_row[:, None] == o_s[None, :]).to(dtype)
    prev = zeros
    buffer = 0
    for c in range(0, p.width, 64):
        wait_for(p.full_bars, i, v)
        slot = i % v.stages
        w = p.ring.index(slot)
        if not v.w_transposed:
            w = view(w, dtype, [64, v.rank], p.w_desc.layout).permute((1, 0))
        if v.biases > 0:
            b = p.bias_ring.index(v.biases * slot + (group if v.row_bias else 0))
            acc = warpgroup_mma(hot, b, zeros, use_acc=False, is_async=True)
            acc = product(z0, z1, z2, z3, w, acc, True, v)
        else:
            acc = product(z0, z1, z2, z3, w, zeros, False, v)
        # While the tensor cores work on this tile, store the one before.
        if c > 0:
            smem = p.h_smem.index(group * CHUNKS + buffer)
            store_tile(prev.to(dtype), row, c - 64, p.y_desc, smem, CHUNKS - 1)
            buffer = (buffer + 1) % CHUNKS
        refill_expand(i - 1, group, p, v)
        prev = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(p.empty_bars.index(slot), count=1)
        i += 1
    smem = p.h_smem.index(group * CHUNKS + buffer)
    last = (p.width - 1) // 64 * 64
    store_tile(prev.to(dtype), row, last, p.y_desc, smem, CHUNKS - 1)
    tma.store_wait(0)
