"""The `transform` kernel of cluster attention for Hopper, with warps that specialise.

One warp copies, two groups of four warps multiply, each its own 64 rows. The copying warp runs
ahead through a ring of weight tiles, from T_b into the up projection and into the next row tile,
so that the groups never start a phase with empty hands, and while one group stores its output the
other keeps the tensor cores busy. The plain kernel computes the same for every other case.
"""

from __future__ import annotations

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

# Named anew after Triton 3.6.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_memory = gl.shared_memory_descriptor
_view = getattr(_memory, "reinterpret", None) or _memory._reinterpret


@gluon.constexpr_function
def _accumulator_layout(cols):
    """A [64, cols] accumulator of one group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])


@gluon.jit
def _tile_rows(tile, full_tiles):
    """First row of a tile, and whether the groups have 64 rows each or share 64."""
    full = tile < full_tiles
    row = gl.where(full, tile * 128, full_tiles * 64 + tile * 64)
    return row, full


@gluon.jit
def _copy(
    h_desc,
    t_desc,
    w_desc,
    h_smem,
    ring,
    h_full,
    h_empty,
    full_bars,
    empty_bars,
    rows,
    tokens,
    width,
    tiles,
    full_tiles,
    MIX: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
    BR: gl.constexpr,
    BC: gl.constexpr,
):
    """The copying warp: h of a row tile once, then T_b of its samples, then the up weight."""
    slot = 0
    phase = 1  # of a fresh barrier: nothing to wait for
    h_phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, full = _tile_rows(tile, full_tiles)
        mbarrier.wait(h_empty, h_phase)
        h_phase ^= 1
        mbarrier.expect(h_full, 128 * BR * 2)
        _load(h_desc, [row, 0], h_full, h_smem.index(0))
        _load(h_desc, [gl.where(full, row + 64, row), 0], h_full, h_smem.index(1))
        if MIX:
            end = gl.minimum(gl.where(full, row + 128, row + 64), rows) - 1
            for sample in range(row // tokens, end // tokens + 1):
                for n in gl.static_range(BR // BC):
                    mbarrier.wait(empty_bars.index(slot), phase)
                    mbarrier.expect(full_bars.index(slot), BC * BR * 2)
                    _load(t_desc, [sample * BR, n * BC], full_bars.index(slot), ring.index(slot))
                    slot += 1
                    if slot == STAGES:
                        slot = 0
                        phase ^= 1
        for c in range(0, width, BC):
            mbarrier.wait(empty_bars.index(slot), phase)
            mbarrier.expect(full_bars.index(slot), BC * BR * 2)
            if W_TRANSPOSED:
                _load(w_desc, [0, c], full_bars.index(slot), ring.index(slot))
            else:
                w = _view(ring.index(slot), w_desc.dtype, [BC, BR], w_desc.layout)
                _load(w_desc, [c, 0], full_bars.index(slot), w)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _multiply(
    group: gl.constexpr,
    w_desc,
    y_desc,
    bias_ptr,
    h_smem,
    y_smem,
    ring,
    h_full,
    h_empty,
    full_bars,
    empty_bars,
    rows,
    tokens,
    width,
    tiles,
    full_tiles,
    MIX: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    BIAS: gl.constexpr,
    ROW_BIAS: gl.constexpr,
    STAGES: gl.constexpr,
    BR: gl.constexpr,
    BC: gl.constexpr,
):
    """One group of four warps: z = h @ T_b for 64 rows, kept in registers, then y = z @ w."""
    dtype: gl.constexpr = y_desc.dtype
    layout: gl.constexpr = _accumulator_layout(BC)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    o_c = gl.arange(0, BC, layout=gl.SliceLayout(0, layout))
    zeros = gl.zeros([64, BC], gl.float32, layout)
    slot = 0
    phase = 0
    h_phase = 0
    buffer = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_row, full = _tile_rows(tile, full_tiles)
        row = gl.where(full, tile_row + group * 64, tile_row)
        first = row // tokens
        last = (gl.minimum(row + 64, rows) - 1) // tokens
        h = h_smem.index(group)
        mbarrier.wait(h_full, h_phase)
        h_phase ^= 1
        if MIX:
            end = gl.minimum(gl.where(full, tile_row + 128, tile_row + 64), rows) - 1
            z0 = gl.zeros([64, BC], dtype, a_layout)
            z1 = z0
            z2 = z0
            z3 = z0
            for sample in range(tile_row // tokens, end // tokens + 1):
                mine = (sample >= first) & (sample <= last)
                # Rows of other samples meet the wrong transform here: keep those of this one.
                keep = ((row + o_m) // tokens == sample)[:, None]
                for n in gl.static_range(BR // BC):
                    mbarrier.wait(full_bars.index(slot), phase)
                    if mine:
                        acc = warpgroup_mma(h, ring.index(slot), zeros, use_acc=False)
                        if n == 0:
                            z0 = _select(keep, acc, z0, layout)
                        if n == 1:
                            z1 = _select(keep, acc, z1, layout)
                        if n == 2:
                            z2 = _select(keep, acc, z2, layout)
                        if n == 3:
                            z3 = _select(keep, acc, z3, layout)
                    mbarrier.arrive(empty_bars.index(slot), count=1)
                    slot += 1
                    if slot == STAGES:
                        slot = 0
                        phase ^= 1
            mbarrier.arrive(h_empty, count=1)
        else:
            a = h.load(gl.DotOperandLayout(0, layout, 2))
            mbarrier.arrive(h_empty, count=1)
        prev = zeros
        prev_c = -1
        for c in range(0, width, BC):
            mbarrier.wait(full_bars.index(slot), phase)
            if full | ((c // BC) % 2 == group):
                w = ring.index(slot)
                if not W_TRANSPOSED:
                    w = _view(w, dtype, [BC, BR], w_desc.layout).permute((1, 0))
                if MIX:
                    acc = warpgroup_mma(z0, w.slice(0, BC), zeros, use_acc=False, is_async=True)
                    if BR > BC:
                        acc = warpgroup_mma(z1, w.slice(BC, BC), acc, is_async=True)
                    if BR > 2 * BC:
                        acc = warpgroup_mma(z2, w.slice(2 * BC, BC), acc, is_async=True)
                        acc = warpgroup_mma(z3, w.slice(3 * BC, BC), acc, is_async=True)
                else:
                    acc = warpgroup_mma(a, w, zeros, use_acc=False, is_async=True)
                # While the tensor cores work on this tile, store the one before.
                if prev_c >= 0:
                    _store_tile(
                        prev,
                        prev_c,
                        row,
                        rows,
                        tokens,
                        width,
                        first,
                        last,
                        y_desc,
                        bias_ptr,
                        y_smem.index(group * 2 + buffer),
                        o_m,
                        o_c,
                        BIAS,
                        ROW_BIAS,
                    )
                    buffer ^= 1
                prev = warpgroup_mma_wait(0, [acc])
                prev_c = c
            mbarrier.arrive(empty_bars.index(slot), count=1)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        if prev_c >= 0:
            _store_tile(
                prev,
                prev_c,
                row,
                rows,
                tokens,
                width,
                first,
                last,
                y_desc,
                bias_ptr,
                y_smem.index(group * 2 + buffer),
                o_m,
                o_c,
                BIAS,
                ROW_BIAS,
            )
            buffer ^= 1
    tma.store_wait(0)


@gluon.jit
def _select(keep, acc, z, layout: gl.constexpr):
    old = gl.convert_layout(z, layout)
    return gl.convert_layout(gl.where(keep, acc.to(z.dtype), old), z.type.layout)


@gluon.jit
def _store_tile(
    y,
    c,
    row,
    rows,
    tokens,
    width,
    first,
    last,
    y_desc,
    bias_ptr,
    smem,
    o_m,
    o_c,
    BIAS: gl.constexpr,
    ROW_BIAS: gl.constexpr,
):
    if BIAS:
        m_c = c + o_c < width
        y += gl.load(bias_ptr + c + o_c, mask=m_c, other=0.0).to(gl.float32)[None, :]
    if ROW_BIAS:
        m_c = c + o_c < width
        samples = rows // tokens
        if last - first < 2:
            p_first = bias_ptr + gl.cast(first, gl.int64) * width + c + o_c
            b_first = gl.load(p_first, mask=m_c & (first < samples), other=0.0)
            p_last = bias_ptr + gl.cast(last, gl.int64) * width + c + o_c
            b_last = gl.load(p_last, mask=m_c & (last < samples), other=0.0)
            in_first = ((row + o_m) // tokens == first)[:, None]
            y += gl.where(in_first, b_first[None, :], b_last[None, :])
        else:
            sample = gl.minimum((row + o_m) // tokens, samples - 1)
            p = bias_ptr + (sample.to(gl.int64) * width)[:, None] + (c + o_c)[None, :]
            y += gl.load(p, mask=m_c[None, :], other=0.0)
    tma.store_wait(1)  # the other buffer may still be on its way, this one is free
    smem.store(y.to(y_desc.dtype))
    fence_async_shared()
    _store(y_desc, [row, c], smem)


@gluon.jit
def transform_kernel(
    h_desc,  # [rows, R], blocks of [64, BR]
    t_desc,  # [B·R, R], blocks of [BR, BC]; unused without MIX
    w_desc,  # [C, R], blocks of [BC, BR], or transposed [R, C], blocks of [BR, BC]
    y_desc,  # [rows, C], blocks of [64, BC]
    bias_ptr,  # [C], or with ROW_BIAS [B, C] fp32
    rows,
    tokens,
    width,
    tiles,
    full_tiles,
    MIX: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    BIAS: gl.constexpr,
    ROW_BIAS: gl.constexpr,
    STAGES: gl.constexpr,
    BR: gl.constexpr,
    BC: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: gl.constexpr = h_desc.dtype
    h_smem = gl.allocate_shared_memory(dtype, [2, 64, BR], h_desc.layout)
    ring = gl.allocate_shared_memory(dtype, [STAGES, BR, BC], t_desc.layout)
    y_smem = gl.allocate_shared_memory(dtype, [4, 64, BC], y_desc.layout)
    h_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    h_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(h_full, count=1)
    mbarrier.init(h_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full_bars.index(i), count=1)
        mbarrier.init(empty_bars.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    w_desc,
                    y_desc,
                    bias_ptr,
                    h_smem,
                    y_smem,
                    ring,
                    h_full,
                    h_empty,
                    full_bars,
                    empty_bars,
                    rows,
                    tokens,
                    width,
                    tiles,
                    full_tiles,
                    MIX,
                    W_TRANSPOSED,
                    BIAS,
                    ROW_BIAS,
                    STAGES,
                    BR,
                    BC,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    w_desc,
                    y_desc,
                    bias_ptr,
                    h_smem,
                    y_smem,
                    ring,
                    h_full,
                    h_empty,
                    full_bars,
                    empty_bars,
                    rows,
                    tokens,
                    width,
                    tiles,
                    full_tiles,
                    MIX,
                    W_TRANSPOSED,
                    BIAS,
                    ROW_BIAS,
                    STAGES,
                    BR,
                    BC,
                ),
            ),
            (
                _copy,
                (
                    h_desc,
                    t_desc,
                    w_desc,
                    h_smem,
                    ring,
                    h_full,
                    h_empty,
                    full_bars,
                    empty_bars,
                    rows,
                    tokens,
                    width,
                    tiles,
                    full_tiles,
                    MIX,
                    W_TRANSPOSED,
                    STAGES,
                    BR,
                    BC,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


@gluon.jit
def _copy_mix(
    h_desc,
    t_desc,
    h_smem,
    ring,
    h_full,
    h_empty,
    full_bars,
    empty_bars,
    rows,
    tokens,
    tiles,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
    BR: gl.constexpr,
):
    slot = 0
    phase = 1
    h_phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = tile * 128
        mbarrier.wait(h_empty, h_phase)
        h_phase ^= 1
        mbarrier.expect(h_full, 128 * BR * 2)
        _load(h_desc, [row, 0], h_full, h_smem.index(0))
        _load(h_desc, [row + 64, 0], h_full, h_smem.index(1))
        end = gl.minimum(row + 128, rows) - 1
        for n in range(0, BR, 64):
            for sample in range(row // tokens, end // tokens + 1):
                full = full_bars.index(slot)
                mbarrier.wait(empty_bars.index(slot), phase)
                mbarrier.expect(full, 64 * BR * 2)
                if TRANSPOSED:
                    _load(t_desc, [sample * BR + n, 0], full, ring.index(slot))
                else:
                    _load(t_desc, [sample * BR, n], full, ring.index(slot))
                slot += 1
                if slot == STAGES:
                    slot = 0
                    phase ^= 1


@gluon.jit
def _multiply_mix(
    group: gl.constexpr,
    z_desc,
    sums_ptr,
    h_smem,
    z_smem,
    ring,
    h_full,
    h_empty,
    full_bars,
    empty_bars,
    rows,
    tokens,
    tiles,
    TRANSPOSED: gl.constexpr,
    SUMS: gl.constexpr,
    STAGES: gl.constexpr,
    BR: gl.constexpr,
):
    layout: gl.constexpr = _accumulator_layout(64)
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    zeros = gl.zeros([64, 64], gl.float32, layout)
    slot = 0
    phase = 0
    h_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = tile * 128 + group * 64
        first = row // tokens
        last = (gl.minimum(row + 64, rows) - 1) // tokens
        tile_last = (gl.minimum(tile * 128 + 128, rows) - 1) // tokens
        mbarrier.wait(h_full, h_phase)
        h_phase ^= 1
        h = h_smem.index(group).load(gl.DotOperandLayout(0, layout, 2))
        mbarrier.arrive(h_empty, count=1)
        for n in range(0, BR, 64):
            z = zeros
            for sample in range(tile * 128 // tokens, tile_last + 1):
                mbarrier.wait(full_bars.index(slot), phase)
                if (sample >= first) & (sample <= last):
                    t = ring.index(slot)
                    if TRANSPOSED:
                        t = t.permute((1, 0))
                    acc = warpgroup_mma(h, t, zeros, use_acc=False)
                    z = gl.where(((row + o_m) // tokens == sample)[:, None], acc, z)
                mbarrier.arrive(empty_bars.index(slot), count=1)
                slot += 1
                if slot == STAGES:
                    slot = 0
                    phase ^= 1
            if SUMS:
                unit = gl.cast(tile * 2 + group, gl.int64)
                gl.store(sums_ptr + unit * BR + n + o_n, gl.sum(z, 0))
            tma.store_wait(0)
            z_smem.index(group).store(z.to(z_desc.dtype))
            fence_async_shared()
            _store(z_desc, [row, n], z_smem.index(group))
    tma.store_wait(0)


@gluon.jit
def mix_rows_kernel(
    h_desc,  # [rows, R], blocks of [64, BR]
    t_desc,  # [B·R, R], blocks of [BR, 64], or for T_bᵀ of [64, BR]
    z_desc,  # [rows, R], blocks of [64, 64]: h @ T_b or h @ T_bᵀ; may be h itself
    sums_ptr,  # [2 * tiles, R] fp32: column sums of z
    rows,
    tokens,
    tiles,
    TRANSPOSED: gl.constexpr,
    SUMS: gl.constexpr,
    STAGES: gl.constexpr,
    BR: gl.constexpr,
    PDL: gl.constexpr,
):
    """The first half of `transform` alone, as the backward needs it."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: gl.constexpr = t_desc.dtype
    h_smem = gl.allocate_shared_memory(dtype, [2, 64, BR], h_desc.layout)
    ring = gl.allocate_shared_memory(dtype, [STAGES] + t_desc.block_type.shape, t_desc.layout)  # noqa: RUF005
    z_smem = gl.allocate_shared_memory(dtype, [2, 64, 64], z_desc.layout)
    h_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    h_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(h_full, count=1)
    mbarrier.init(h_empty, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full_bars.index(i), count=1)
        mbarrier.init(empty_bars.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply_mix,
                (
                    0,
                    z_desc,
                    sums_ptr,
                    h_smem,
                    z_smem,
                    ring,
                    h_full,
                    h_empty,
                    full_bars,
                    empty_bars,
                    rows,
                    tokens,
                    tiles,
                    TRANSPOSED,
                    SUMS,
                    STAGES,
                    BR,
                ),
            ),
            (
                _multiply_mix,
                (
                    1,
                    z_desc,
                    sums_ptr,
                    h_smem,
                    z_smem,
                    ring,
                    h_full,
                    h_empty,
                    full_bars,
                    empty_bars,
                    rows,
                    tokens,
                    tiles,
                    TRANSPOSED,
                    SUMS,
                    STAGES,
                    BR,
                ),
            ),
            (
                _copy_mix,
                (
                    h_desc,
                    t_desc,
                    h_smem,
                    ring,
                    h_full,
                    h_empty,
                    full_bars,
                    empty_bars,
                    rows,
                    tokens,
                    tiles,
                    TRANSPOSED,
                    STAGES,
                    BR,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


@gluon.jit
def _copy_rows(
    x_desc,
    w_desc,
    x_ring,
    w_ring,
    full_bars,
    empty_bars,
    width,
    tiles,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
    BR: gl.constexpr,
):
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for k in range(0, width, 64):
            full = full_bars.index(slot)
            mbarrier.wait(empty_bars.index(slot), phase)
            mbarrier.expect(full, (128 + BR) * 64 * 2)
            _load(x_desc, [tile * 128, k], full, x_ring.index(2 * slot))
            _load(x_desc, [tile * 128 + 64, k], full, x_ring.index(2 * slot + 1))
            if TRANSPOSED:
                _load(w_desc, [k, 0], full, w_ring.index(slot))
            else:
                _load(w_desc, [0, k], full, w_ring.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _multiply_rows(
    group: gl.constexpr,
    out_desc,
    bias_ptr,
    sums_ptr,
    x_ring,
    w_ring,
    hot_smem,
    out_smem,
    full_bars,
    empty_bars,
    rows,
    width,
    rank,
    tokens,
    slots,
    tiles,
    TRANSPOSED: gl.constexpr,
    BIAS: gl.constexpr,
    SUMS: gl.constexpr,
    STAGES: gl.constexpr,
    BR: gl.constexpr,
):
    dtype: gl.constexpr = out_desc.dtype
    layout: gl.constexpr = _accumulator_layout(BR)
    s_layout: gl.constexpr = _accumulator_layout(16)
    o_r = gl.arange(0, BR, layout=gl.SliceLayout(0, layout))
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
    o_s = gl.arange(0, 16, layout=gl.SliceLayout(0, s_layout))
    no_sums = gl.zeros([64, 16], gl.float32, s_layout)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = tile * 128 + group * 64
        first = row // tokens
        present = (gl.minimum(row + 64, rows) - 1) // tokens - first + 1
        if SUMS:
            hot = ((row + o_m) // tokens - first)[:, None] == o_s[None, :]
            hot_smem.index(group).store(hot.to(dtype))
            fence_async_shared()
            unit = gl.cast(tile * 2 + group, gl.int64)
            p_sums = sums_ptr + unit * slots * width + o_m[:, None] + (o_s * width)[None, :]
        acc = gl.zeros([64, BR], gl.float32, layout)
        for k in range(0, width, 64):
            mbarrier.wait(full_bars.index(slot), phase)
            x = x_ring.index(2 * slot + group)
            w = w_ring.index(slot)
            if not TRANSPOSED:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x, w, acc, is_async=True)
            if SUMS:
                sums = warpgroup_mma(
                    x.permute((1, 0)), hot_smem.index(group), no_sums, use_acc=False, is_async=True
                )
                acc, sums = warpgroup_mma_wait(0, [acc, sums])
            else:
                acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty_bars.index(slot), count=1)
            if SUMS:
                m_sums = (k + o_m < width)[:, None] & (o_s < present)[None, :]
                gl.store(p_sums + k, sums, mask=m_sums)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        if BIAS:
            acc += gl.load(bias_ptr + o_r, mask=o_r < rank, other=0.0).to(gl.float32)[None, :]
        tma.store_wait(0)
        out_smem.index(group).store(acc.to(dtype))
        fence_async_shared()
        _store(out_desc, [row, 0], out_smem.index(group))
    tma.store_wait(0)


@gluon.jit
def project_kernel(
    x_desc,  # [rows, C], blocks of [64, 64]
    w_desc,  # [R, C], blocks of [BR, 64], or transposed [C, R], blocks of [64, BR]
    out_desc,  # [rows, R], blocks of [64, BR]
    bias_ptr,  # [R]
    sums_ptr,  # [2 * tiles, slots, C] fp32
    rows,
    width,
    rank,
    tokens,
    slots,
    tiles,
    TRANSPOSED: gl.constexpr,
    BIAS: gl.constexpr,
    SUMS: gl.constexpr,
    STAGES: gl.constexpr,
    BR: gl.constexpr,
    PDL: gl.constexpr,
):
    """x @ weight with the sums of x over the tokens of each sample, in tiles of 128 rows."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: gl.constexpr = x_desc.dtype
    hot_layout: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    x_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], x_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    hot_smem = gl.allocate_shared_memory(dtype, [2, 64, 16], hot_layout)
    out_smem = gl.allocate_shared_memory(dtype, [2, 64, BR], out_desc.layout)
    full_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full_bars.index(i), count=1)
        mbarrier.init(empty_bars.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply_rows,
                (
                    0,
                    out_desc,
                    bias_ptr,
                    sums_ptr,
                    x_ring,
                    w_ring,
                    hot_smem,
                    out_smem,
                    full_bars,
                    empty_bars,
                    rows,
                    width,
                    rank,
                    tokens,
                    slots,
                    tiles,
                    TRANSPOSED,
                    BIAS,
                    SUMS,
                    STAGES,
                    BR,
                ),
            ),
            (
                _multiply_rows,
                (
                    1,
                    out_desc,
                    bias_ptr,
                    sums_ptr,
                    x_ring,
                    w_ring,
                    hot_smem,
                    out_smem,
                    full_bars,
                    empty_bars,
                    rows,
                    width,
                    rank,
                    tokens,
                    slots,
                    tiles,
                    TRANSPOSED,
                    BIAS,
                    SUMS,
                    STAGES,
                    BR,
                ),
            ),
            (
                _copy_rows,
                (
                    x_desc,
                    w_desc,
                    x_ring,
                    w_ring,
                    full_bars,
                    empty_bars,
                    width,
                    tiles,
                    TRANSPOSED,
                    STAGES,
                    BR,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )
