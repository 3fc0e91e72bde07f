"""The two large kernels of cluster attention for Hopper.

One to three groups of four warps, each with 64 rows of its own, share a ring of weight tiles. The
first group refills it ahead of all, so that none starts a phase with empty hands, and they run free
of each other otherwise: while one stores its output, the others keep the tensor cores busy. The
plain kernels compute the same for every other case.

All tiles are 64 columns wide. A program handles one tile of rows from its first copy to its last
store; the launcher chooses as many groups as make the fewest waves. There is no warp that only
copies: with it a third group would leave every thread 128 registers, fewer than its sums take.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.gluon_hopper import (
    accumulator_layout,
    halves,
    load,
    ring_barriers,
    store,
    view,
    wait_for,
)


@gluon.jit
def _store_tile(t, row, col, desc, smem, PENDING: gl.constexpr):
    """Stores t through smem, of which ``PENDING`` other stores may not have been read yet.

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


@dataclass(frozen=True)
class Project:
    """A variant of ``project_kernel``."""

    rank: int  # 64, 128 or 256
    groups: int
    stages: int  # of the ring; at least rank / 64, at most 3 of them
    slots: int  # samples that 64 rows may belong to: 8 or 16
    transposed: bool  # the weight is [C, R]
    bias: bool
    sums: bool
    mix: bool  # also out @ T_bᵀ
    mixed_sums: bool


@gluon.jit
def _fill_project(i, args, v: gl.constexpr):
    """Starts the copies of item i: a tile of x and of the weight, then tiles of T_b."""
    x_desc, w_desc, t_desc = args[0], args[1], args[2]
    x_ring, w_ring, full_bars = args[3], args[4], args[5]
    steps, samples, first, row = args[6], args[7], args[8], args[9]
    slot = i % v.stages
    full = full_bars.index(slot)
    if i < steps:
        mbarrier.expect(full, (64 * v.groups + v.rank) * 64 * 2)
        for group in gl.static_range(gl.constexpr(v.groups)):
            load(x_desc, [row + 64 * group, i * 64], full, x_ring.index(v.groups * slot + group))
        if v.transposed:
            load(w_desc, [i * 64, 0], full, w_ring.index(slot))
        else:
            load(w_desc, [0, i * 64], full, w_ring.index(slot))
    elif v.mix:
        n = (i - steps) // samples
        sample = first + (i - steps) % samples
        mbarrier.expect(full, v.rank * 64 * 2)
        load(t_desc, [sample * v.rank + n * 64, 0], full, w_ring.index(slot))


@gluon.jit
def _refill_project(i, group: gl.constexpr, items, empty_bars, fill, v: gl.constexpr):
    """The first group refills the slot of item i once all groups are through with it."""
    if group == 0 and i >= 0 and i + v.stages < items:
        wait_for(empty_bars, i, v)
        _fill_project(i + v.stages, fill, v)


@gluon.jit
def _project_group(group: gl.constexpr, args, fill, v: gl.constexpr):
    out_desc, mixed_desc = args[0], args[1]
    bias_ptr, sums_ptr, mixed_sums_ptr = args[2], args[3], args[4]
    x_ring, w_ring, hot_smem, full_bars, empty_bars = args[5], args[6], args[7], args[8], args[9]
    rows, width, tokens, slots, mix_tokens = args[10], args[11], args[12], args[13], args[14]
    steps, items, samples, first_sample = args[15], args[16], args[17], args[18]
    dtype: gl.constexpr = out_desc.dtype
    BR: gl.constexpr = v.rank
    BS: gl.constexpr = v.slots
    layout: gl.constexpr = accumulator_layout(BR)
    s_layout: gl.constexpr = accumulator_layout(BS)
    hot_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    unit = gl.program_id(0) * v.groups + group
    row = unit * 64
    if group == 0:
        for i in gl.static_range(gl.constexpr(v.stages)):
            if i < items:
                _fill_project(i, fill, v)
    if v.sums:
        # Summing rows is a product with the one-hot matrix "row belongs to the s-th sample".
        first = row // tokens
        present = (gl.minimum(row + 64, rows) - 1) // tokens - first + 1
        o_h = gl.arange(0, 64, layout=gl.SliceLayout(0, hot_layout))
        o_t = gl.arange(0, BS, layout=gl.SliceLayout(1, hot_layout))
        hot = o_t[:, None] == ((row + o_h) // tokens - first)[None, :]
        hot_smem.index(group).store(hot.to(dtype))
        fence_async_shared()
        hot_t = hot_smem.index(group).permute((1, 0))
        o_c = gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
        o_s = gl.arange(0, BS, layout=gl.SliceLayout(0, s_layout))
        p_sums = sums_ptr + gl.cast(unit, gl.int64) * slots * width
        o_sums = o_c[:, None] + (o_s * width)[None, :]
        no_sums = gl.zeros([64, BS], gl.float32, s_layout)
    acc = gl.zeros([64, BR], gl.float32, layout)
    for i in range(steps):
        wait_for(full_bars, i, v)
        x = x_ring.index(v.groups * (i % v.stages) + group)
        w = w_ring.index(i % v.stages)
        if not v.transposed:
            w = w.permute((1, 0))
        if v.sums:
            sums = warpgroup_mma(x.permute((1, 0)), hot_t, no_sums, use_acc=False, is_async=True)
        acc = warpgroup_mma(x, w, acc, is_async=True)
        _refill_project(i - 1, group, items, empty_bars, fill, v)
        if v.sums:
            # They are put away while the larger product runs.
            sums = warpgroup_mma_wait(1, [sums])
            m_sums = (o_s < present)[None, :] & (i * 64 + o_c < width)[:, None]
            gl.store(p_sums + (o_sums + i * 64), sums, mask=m_sums)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty_bars.index(i % v.stages), count=1)
    if v.bias:
        o_r = gl.arange(0, BR, layout=gl.SliceLayout(0, layout))
        acc += gl.load(bias_ptr + o_r).to(gl.float32)[None, :]
    out = acc.to(dtype)
    # The group's own slots of x are free: they carry its output by 64 columns.
    if BR == 64:
        _store_tile(out, row, 0, out_desc, x_ring.index(group), 0)
    elif BR == 128:
        left, right = halves(out)
        _store_tile(left, row, 0, out_desc, x_ring.index(group), 0)
        _store_tile(right, row, 64, out_desc, x_ring.index(v.groups + group), 1)
    else:
        left, right = halves(out)
        t0, t1 = halves(left)
        t2, t3 = halves(right)
        _store_tile(t0, row, 0, out_desc, x_ring.index(group), 0)
        _store_tile(t1, row, 64, out_desc, x_ring.index(v.groups + group), 1)
        _store_tile(t2, row, 128, out_desc, x_ring.index(2 * v.groups + group), 2)
        _store_tile(t3, row, 192, out_desc, x_ring.index(group), 2)
    if v.mix:
        t_layout: gl.constexpr = accumulator_layout(64)
        a = gl.convert_layout(out, gl.DotOperandLayout(0, t_layout, 2))
        o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, t_layout))
        o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, t_layout))
        zeros = gl.zeros([64, 64], gl.float32, t_layout)
        mine_first = row // mix_tokens
        mine_last = (gl.minimum(row + 64, rows) - 1) // mix_tokens
        i = steps
        for n in gl.static_range(BR // 64):
            z = zeros
            for sample in range(first_sample, first_sample + samples):
                wait_for(full_bars, i, v)
                _refill_project(i - 1, group, items, empty_bars, fill, v)
                if (sample >= mine_first) & (sample <= mine_last):
                    t = w_ring.index(i % v.stages).permute((1, 0))
                    mixed = warpgroup_mma(a, t, zeros, use_acc=False, is_async=True)
                    mixed = warpgroup_mma_wait(0, [mixed])
                    # Rows of other samples met the wrong transform: keep those of this one.
                    z = gl.where(((row + o_m) // mix_tokens == sample)[:, None], mixed, z)
                mbarrier.arrive(empty_bars.index(i % v.stages), count=1)
                i += 1
            if v.mixed_sums:
                p_z = mixed_sums_ptr + gl.cast(unit, gl.int64) * BR + n * 64 + o_n
                gl.store(p_z, gl.sum(z, 0))
            buffer = x_ring.index(v.groups * ((n + 1) % v.stages) + group)
            _store_tile(z.to(dtype), row, n * 64, mixed_desc, buffer, 0)
    tma.store_wait(0)


@gluon.jit
def project_kernel(
    x_desc,  # [rows, C], blocks of [64, 64]
    w_desc,  # [R, C], blocks of [R, 64], or transposed [C, R], blocks of [64, R]
    t_desc,  # [B·R, R], blocks of [64, R]; None without mix
    out_desc,  # [rows, R], blocks of [64, 64]: x @ weight + bias
    mixed_desc,  # the same: out @ T_bᵀ
    bias_ptr,  # [R]
    sums_ptr,  # [row blocks of 64, slots, C] fp32: column sums of x, of each sample's rows
    mixed_sums_ptr,  # [row blocks of 64, R] fp32: column sums of out @ T_bᵀ
    rows,
    width,
    tokens,  # rows of a sample of the sums
    slots,
    mix_tokens,  # rows of a sample of T_b
    v: gl.constexpr,  # Project
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x_ring = gl.allocate_shared_memory(dtype, [v.groups * v.stages, 64, 64], x_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [v.stages] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    hot_smem = gl.allocate_shared_memory(dtype, [v.groups, v.slots, 64], x_desc.layout)
    full_bars, empty_bars = ring_barriers(v.stages, v.groups)
    fence_async_shared()
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = gl.program_id(0) * (64 * v.groups)
    steps = (width + 63) // 64
    items = steps
    first_sample = 0
    samples = 1
    if v.mix:
        first_sample = row // mix_tokens
        samples = (gl.minimum(row + 64 * v.groups, rows) - 1) // mix_tokens + 1 - first_sample
        items += samples * (v.rank // 64)
    # fmt: off
    args = (
        out_desc, mixed_desc, bias_ptr, sums_ptr, mixed_sums_ptr, x_ring, w_ring, hot_smem,
        full_bars, empty_bars, rows, width, tokens, slots, mix_tokens, steps, items, samples,
        first_sample,
    )
    # fmt: on
    fill = (x_desc, w_desc, t_desc, x_ring, w_ring, full_bars, steps, samples, first_sample, row)
    if v.groups == 1:
        _project_group(0, args, fill, v)
    elif v.groups == 2:
        gl.warp_specialize(
            [(_project_group, (0, args, fill, v)), (_project_group, (1, args, fill, v))],
            [4],
            [240],
        )
    else:
        gl.warp_specialize(
            [
                (_project_group, (0, args, fill, v)),
                (_project_group, (1, args, fill, v)),
                (_project_group, (2, args, fill, v)),
            ],
            [4, 4],
            [168, 168],
        )


@dataclass(frozen=True)
class Transform:
    """A variant of ``transform_kernel``."""

    rank: int  # 64, 128 or 256
    groups: int
    stages: int  # of the ring
    mix: bool  # z = h @ T_b, or z = h
    store_z: bool
    w_transposed: bool  # the weight is [R, C]
    biases: int  # blocks of biases that a tile needs: none, one, or with row_bias one of each group
    row_bias: bool  # every sample has a bias of its own
    aligned: bool  # every group has one sample, of up to 64 tokens, instead of 64 rows


@gluon.jit
def _fill_transform(i, args, v: gl.constexpr):
    """Starts the copies of item i: a tile of T_b, of all samples in turn, then of the weight."""
    t_desc, w_desc, bias_desc, ring, bias_ring = args[0], args[1], args[2], args[3], args[4]
    full_bars, t_items, first, row, tokens = args[5], args[6], args[7], args[8], args[9]
    slot = i % v.stages
    full = full_bars.index(slot)
    if v.mix and i < t_items:
        mbarrier.expect(full, 64 * v.rank * 2)
        sample = first + i // (v.rank // 64)
        load(t_desc, [sample * v.rank, i % (v.rank // 64) * 64], full, ring.index(slot))
    else:
        c = (i - t_items) * 64
        mbarrier.expect(full, (v.rank + 16 * v.biases) * 64 * 2)
        if v.w_transposed:
            load(w_desc, [0, c], full, ring.index(slot))
        else:
            w = view(ring.index(slot), w_desc.dtype, [64, v.rank], w_desc.layout)
            load(w_desc, [c, 0], full, w)
        for j in gl.static_range(gl.constexpr(v.biases)):
            sample = (row + 64 * j) // tokens if v.row_bias else 0
            load(bias_desc, [sample, c], full, bias_ring.index(v.biases * slot + j))


@gluon.jit
def _refill_transform(i, group: gl.constexpr, items, empty_bars, fill, v: gl.constexpr):
    """The first group refills the slot of item i once all groups are through with it."""
    if group == 0 and i >= 0 and i + v.stages < items:
        wait_for(empty_bars, i, v)
        _fill_transform(i + v.stages, fill, v)


@gluon.jit
def _select(keep, acc, z, layout: gl.constexpr):
    """acc where ``keep``, z elsewhere; both layouts hold a value in the same register."""
    old = gl.convert_layout(z, layout)
    return gl.convert_layout(gl.where(keep, acc.to(z.dtype), old), z.type.layout)


@gluon.jit
def _product(a0, a1, a2, a3, w, acc, USE_ACC: gl.constexpr, v: gl.constexpr):
    """Starts a @ w, a in chunks of 64 columns."""
    acc = warpgroup_mma(a0, w.slice(0, 64), acc, use_acc=USE_ACC, is_async=True)
    if v.rank > 64:
        acc = warpgroup_mma(a1, w.slice(64, 64), acc, is_async=True)
    if v.rank > 128:
        acc = warpgroup_mma(a2, w.slice(128, 64), acc, is_async=True)
        acc = warpgroup_mma(a3, w.slice(192, 64), acc, is_async=True)
    return acc


@gluon.jit
def _transform_group(group: gl.constexpr, args, fill, v: gl.constexpr):
    h_desc, w_desc, z_desc, y_desc = args[0], args[1], args[2], args[3]
    h_smem, ring, bias_ring = args[4], args[5], args[6]
    h_full, full_bars, empty_bars = args[7], args[8], args[9]
    rows, tokens, width, items = args[10], args[11], args[12], args[13]
    first_sample, samples = args[14], args[15]
    dtype: gl.constexpr = y_desc.dtype
    CHUNKS: gl.constexpr = v.rank // 64
    layout: gl.constexpr = accumulator_layout(64)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    zeros = gl.zeros([64, 64], gl.float32, layout)
    height = tokens if v.aligned else 64
    row = (gl.program_id(0) * v.groups + group) * height
    first = row // tokens
    last = (gl.minimum(row + height, rows) - 1) // tokens
    if group == 0:
        mbarrier.expect(h_full, v.groups * 64 * v.rank * 2)
        for n in gl.static_range(gl.constexpr(v.groups * CHUNKS)):
            load(h_desc, [row + n // CHUNKS * height, n % CHUNKS * 64], h_full, h_smem.index(n))
        for i in gl.static_range(gl.constexpr(v.stages)):
            if i < items:
                _fill_transform(i, fill, v)
    mbarrier.wait(h_full, 0)
    h0 = h_smem.index(group * CHUNKS)
    h1 = h_smem.index(group * CHUNKS + 1 % CHUNKS)
    h2 = h_smem.index(group * CHUNKS + 2 % CHUNKS)
    h3 = h_smem.index(group * CHUNKS + 3 % CHUNKS)
    i = 0
    if v.mix:
        z0 = gl.zeros([64, 64], dtype, a_layout)
        z1 = z0
        z2 = z0
        z3 = z0
        for sample in range(first_sample, first_sample + samples):
            mine = (sample >= first) & (sample <= last)
            # Rows of other samples meet the wrong transform here: keep those of this one.
            keep = ((row + o_m) // tokens == sample)[:, None]
            for n in gl.static_range(CHUNKS):
                wait_for(full_bars, i, v)
                _refill_transform(i - 1, group, items, empty_bars, fill, v)
                if mine:
                    acc = _product(h0, h1, h2, h3, ring.index(i % v.stages), zeros, False, v)
                    acc = warpgroup_mma_wait(0, [acc])
                    if n == 0:
                        z0 = _select(keep, acc, z0, layout)
                    if n == 1:
                        z1 = _select(keep, acc, z1, layout)
                    if n == 2:
                        z2 = _select(keep, acc, z2, layout)
                    if n == 3:
                        z3 = _select(keep, acc, z3, layout)
                mbarrier.arrive(empty_bars.index(i % v.stages), count=1)
                i += 1
    else:
        z0 = h0.load(a_layout)
        z1 = h1.load(a_layout)
        z2 = h2.load(a_layout)
        z3 = h3.load(a_layout)
    # The group's part of h is free now: it carries the output.
    if v.store_z:
        _store_tile(gl.convert_layout(z0, layout), row, 0, z_desc, h0, 3)
        if CHUNKS > 1:
            _store_tile(gl.convert_layout(z1, layout), row, 64, z_desc, h1, 3)
        if CHUNKS > 2:
            _store_tile(gl.convert_layout(z2, layout), row, 128, z_desc, h2, 3)
            _store_tile(gl.convert_layout(z3, layout), row, 192, z_desc, h3, 3)
    # Adding biases is a product, too, with the one-hot matrix "row has the s-th of 16 biases".
    o_row = gl.arange(0, 64, layout=gl.SliceLayout(1, a_layout))
    o_s = gl.arange(0, 16, layout=gl.SliceLayout(0, a_layout))
    of_row = (row + o_row) // tokens - first if v.row_bias else o_row * 0
    hot = (of_row[:, None] == o_s[None, :]).to(dtype)
    prev = zeros
    buffer = 0
    for c in range(0, width, 64):
        wait_for(full_bars, i, v)
        slot = i % v.stages
        w = ring.index(slot)
        if not v.w_transposed:
            w = view(w, dtype, [64, v.rank], w_desc.layout).permute((1, 0))
        if v.biases > 0:
            b = bias_ring.index(v.biases * slot + (group if v.row_bias else 0))
            acc = warpgroup_mma(hot, b, zeros, use_acc=False, is_async=True)
            acc = _product(z0, z1, z2, z3, w, acc, True, v)
        else:
            acc = _product(z0, z1, z2, z3, w, zeros, False, v)
        # While the tensor cores work on this tile, put the one before away.
        if c > 0:
            smem = h_smem.index(group * CHUNKS + buffer)
            _store_tile(prev.to(dtype), row, c - 64, y_desc, smem, CHUNKS - 1)
            buffer = (buffer + 1) % CHUNKS
        _refill_transform(i - 1, group, items, empty_bars, fill, v)
        prev = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(empty_bars.index(slot), count=1)
        i += 1
    smem = h_smem.index(group * CHUNKS + buffer)
    _store_tile(prev.to(dtype), row, (width - 1) // 64 * 64, y_desc, smem, CHUNKS - 1)
    tma.store_wait(0)


@gluon.jit
def transform_kernel(
    h_desc,  # [rows, R], blocks of [64, 64]
    t_desc,  # [B·R, R], blocks of [R, 64]; None without mix
    w_desc,  # [C, R], blocks of [64, R], or transposed [R, C], blocks of [R, 64]
    z_desc,  # [rows, R], blocks of [64, 64], or aligned [B, N, R], [1, 64, 64]; or None
    y_desc,  # [rows, C], blocks of [64, 64], or aligned [B, N, C], [1, 64, 64]
    bias_desc,  # [1, C], or one row for each sample [B, C]; blocks of [16, 64]
    rows,
    tokens,
    width,
    v: gl.constexpr,  # Transform
    PDL: gl.constexpr,
):
    """z = h @ T_b, then y = z @ weight + bias."""
    dtype: gl.constexpr = h_desc.dtype
    h_smem = gl.allocate_shared_memory(dtype, [v.groups * v.rank // 64, 64, 64], h_desc.layout)
    ring = gl.allocate_shared_memory(dtype, [v.stages, v.rank, 64], h_desc.layout)
    biases: gl.constexpr = max(1, v.stages * v.biases)
    bias_ring = gl.allocate_shared_memory(dtype, [biases, 16, 64], h_desc.layout)
    h_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(h_full, count=1)
    full_bars, empty_bars = ring_barriers(v.stages, v.groups)
    fence_async_shared()
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    height = v.groups * (tokens if v.aligned else 64)
    row = gl.program_id(0) * height
    first_sample = row // tokens
    samples = (gl.minimum(row + height, rows) - 1) // tokens + 1 - first_sample
    t_items = 0
    if v.mix:
        t_items = samples * (v.rank // 64)
    items = t_items + (width + 63) // 64
    # fmt: off
    args = (
        h_desc, w_desc, z_desc, y_desc, h_smem, ring, bias_ring, h_full, full_bars, empty_bars,
        rows, tokens, width, items, first_sample, samples,
    )
    fill = (
        t_desc, w_desc, bias_desc, ring, bias_ring, full_bars, t_items, first_sample, row, tokens,
    )
    # fmt: on
    if v.groups == 1:
        _transform_group(0, args, fill, v)
    elif v.groups == 2:
        gl.warp_specialize(
            [(_transform_group, (0, args, fill, v)), (_transform_group, (1, args, fill, v))],
            [4],
            [240],
        )
    else:
        gl.warp_specialize(
            [
                (_transform_group, (0, args, fill, v)),
                (_transform_group, (1, args, fill, v)),
                (_transform_group, (2, args, fill, v)),
            ],
            [4, 4],
            [168, 168],
        )
