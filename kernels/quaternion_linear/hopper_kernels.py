"""The Hamilton products of large quaternion layers for Hopper, with warps that specialise.

A component of the result is a sum over four (with a zero half, two) products of one component of
the left factor with one of the right, whose number is the other two's exclusive or:

    out[c] = sum over a of sign(a, c) · left[a] @ right[a ^ c]

so that a layer is a dense product that picks its tiles: no larger matrix is ever built. Products
with a negative sign come first, and then the accumulator's sign is turned once.

One warp copies tiles into a ring, two groups of four warps multiply, each 64 of 128 rows. The
plain kernels compute the same for every other case.
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

from ..common.gluon_hopper import accumulator_layout, load, ring_barriers, store


@gluon.jit
def _locate(tile, tiles_n, first, count, SUMMED: gl.constexpr):
    """Component, row block, column block of a tile; SUMMED: row block of all splits."""
    if SUMMED:
        c = tile % count
        rest = tile // count
        return first + c, rest // tiles_n, rest % tiles_n
    per_row = count * tiles_n
    rest = tile % per_row
    return first + rest // tiles_n, tile // per_row, rest % tiles_n


@gluon.jit
def _copy(
    args,
    TERMS: gl.constexpr,
    SKIPPED: gl.constexpr,
    KIND: gl.constexpr,
    STAGES: gl.constexpr,
    BN: gl.constexpr,
):
    """The copying warp."""
    left_desc, right0_desc, right1_desc, right2_desc = args[0], args[1], args[2], args[3]
    right3_desc, left_ring, right_ring, full_bars = args[4], args[5], args[6], args[7]
    empty_bars, order, first, count, depth = args[8], args[9], args[10], args[11], args[12]
    height, width, steps, chunk, tiles = args[13], args[14], args[15], args[16], args[17]
    tiles_m, tiles_n = args[18], args[19]
    slot = 0
    phase = 1  # of a fresh barrier: nothing to wait for
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        c, m, n = _locate(tile, tiles_n, first, count, KIND == "weights")
        start = 0
        if KIND == "weights":
            start = (m // tiles_m) * steps * 64
            m = m % tiles_m
        m = m * 128
        n = n * BN
        for turn in range(gl.cdiv(steps, chunk) * TERMS):
            a = (order >> (8 * c + 2 * (turn % TERMS))) & 3
            b = a ^ c
            done = turn // TERMS * chunk
            for step in range(done, gl.minimum(done + chunk, steps)):
                k = start + step * 64
                full = full_bars.index(slot)
                mbarrier.wait(empty_bars.index(slot), phase)
                mbarrier.expect(full, (128 + BN) * 64 * 2)
                right = right_ring.index(slot)
                if KIND == "weights":
                    col = (a - SKIPPED) * height + m
                    load(left_desc, [k, col], full, left_ring.index(2 * slot))
                    load(left_desc, [k, col + 64], full, left_ring.index(2 * slot + 1))
                    load(right0_desc, [k, b * width + n], full, right)
                else:
                    col = (a - SKIPPED) * depth + k
                    load(left_desc, [m, col], full, left_ring.index(2 * slot))
                    load(left_desc, [m + 64, col], full, left_ring.index(2 * slot + 1))
                    row = k
                    col = n
                    if KIND == "input":
                        row = n
                        col = k
                    if b == 0:
                        load(right0_desc, [row, col], full, right)
                    elif b == 1:
                        load(right1_desc, [row, col], full, right)
                    elif b == 2:
                        load(right2_desc, [row, col], full, right)
                    else:
                        load(right3_desc, [row, col], full, right)
                slot += 1
                if slot == STAGES:
                    slot = 0
                    phase ^= 1


@gluon.jit
def _accumulate(
    group: gl.constexpr,
    acc,
    steps,
    done,
    ring,
    slot,
    phase,
    sums,  # with SUMS: ones, and what _put_sums takes
    KIND: gl.constexpr,
    STAGES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """acc + the products of the next ``steps`` pairs of tiles in the ring; the left tiles' column
    sums on the side."""
    left_ring, right_ring, full_bars, empty_bars = ring[0], ring[1], ring[2], ring[3]
    before = 0
    for step in range(steps):
        mbarrier.wait(full_bars.index(slot), phase)
        left = left_ring.index(2 * slot + group)
        right = right_ring.index(slot)
        if KIND == "weights":
            left = left.permute((1, 0))
        if KIND == "input":
            right = right.permute((1, 0))
        if SUMS:
            # Summing rows is a product with ones.
            zeros = gl.zeros([64, 8], gl.float32, accumulator_layout(8))
            ones = sums[0].permute((1, 0))
            columns = warpgroup_mma(left.permute((1, 0)), ones, zeros, use_acc=False, is_async=True)
        acc = warpgroup_mma(left, right, acc, is_async=True)
        # The product before this one is done, and so are the sums.
        if SUMS:
            acc, columns = warpgroup_mma_wait(1, [acc, columns])
            _put_sums(columns, sums, done + step)
        else:
            acc = warpgroup_mma_wait(1, [acc])
        if step > 0:
            mbarrier.arrive(empty_bars.index(before), count=1)
        before = slot
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
    acc = warpgroup_mma_wait(0, [acc])
    if steps > 0:
        mbarrier.arrive(empty_bars.index(before), count=1)
    return acc, slot, phase


@gluon.jit
def _accumulate_signs(
    group: gl.constexpr,
    acc,
    minus,
    plus,
    ring,
    slot,
    phase,
    sums,
    KIND: gl.constexpr,
    STAGES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """acc − the products of the next ``minus`` steps + those of the next ``plus``."""
    acc, slot, phase = _accumulate(
        group, -acc, minus, 0, ring, slot, phase, sums, KIND, STAGES, SUMS
    )
    return _accumulate(group, -acc, plus, minus, ring, slot, phase, sums, KIND, STAGES, SUMS)


@gluon.jit
def _put_sums(columns, sums, step):
    """Stores the sums over a tile's rows, of 64 columns of the component whose turn it is."""
    sums_ptr, order, steps, depth = sums[1], sums[2], sums[3], sums[4]
    a = (order >> (2 * (step // steps))) & 3
    layout: gl.constexpr = columns.type.layout
    o_k = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    first = gl.arange(0, 8, layout=gl.SliceLayout(0, layout)) == 0  # all eight are the same
    p_sums = sums_ptr + a * depth + step % steps * 64 + o_k
    gl.store(p_sums[:, None] + 0 * first.to(gl.int32)[None, :], columns, mask=first[None, :])


@gluon.jit
def _multiply(
    group: gl.constexpr,
    args,
    TERMS: gl.constexpr,
    KIND: gl.constexpr,
    BIAS: gl.constexpr,
    SUMS: gl.constexpr,
    STAGES: gl.constexpr,
    BN: gl.constexpr,
):
    """One group of four warps."""
    out_desc, out_ptr, bias_ptr, left_ring = args[0], args[1], args[2], args[3]
    right_ring, out_smem, full_bars, empty_bars = args[4], args[5], args[6], args[7]
    negative, first, count, height, width = args[8], args[9], args[10], args[11], args[12]
    steps, chunk, tiles, tiles_m, tiles_n = args[13], args[14], args[15], args[16], args[17]
    sums_ptr, ones_smem, order, depth = args[18], args[19], args[20], args[21]
    layout: gl.constexpr = accumulator_layout(BN)
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, layout))
    slot = 0
    phase = 0
    if SUMS:
        ones_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        ones_smem.index(group).store(
            gl.full([8, 64], 1.0, gl.float32, ones_layout).to(left_ring.dtype)
        )
        fence_async_shared()
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        c, m, n = _locate(tile, tiles_n, first, count, KIND == "weights")
        if SUMS:
            unit = gl.cast(2 * m + group, gl.int64)
            sums = (
                ones_smem.index(group),
                sums_ptr + unit * (4 * depth),
                order >> (8 * c),
                steps,
                depth,
            )
        n = n * BN
        if BIAS:  # on its way while the products run
            bias = gl.load(bias_ptr + c * width + n + o_n)
        minus = (negative >> (4 * c)) & 7
        acc = gl.zeros([64, BN], gl.float32, layout)
        ring = (left_ring, right_ring, full_bars, empty_bars)
        for done in range(0, steps, chunk):
            size = gl.minimum(chunk, steps - done)
            plus = (TERMS - minus) * size
            minus_size = minus * size
            if SUMS:
                # A tile of the first component and columns sees all components of the left factor.
                if (c == first) & (n == 0):
                    acc, slot, phase = _accumulate_signs(
                        group, acc, minus_size, plus, ring, slot, phase, sums, KIND, STAGES, True
                    )
                else:
                    acc, slot, phase = _accumulate_signs(
                        group, acc, minus_size, plus, ring, slot, phase, sums, KIND, STAGES, False
                    )
            else:
                acc, slot, phase = _accumulate_signs(
                    group, acc, minus_size, plus, ring, slot, phase, ring, KIND, STAGES, False
                )
        if KIND == "weights":
            # [splits, 4, height, width]
            row = (m % tiles_m) * 128 + group * 64 + o_m
            page = gl.cast((m // tiles_m) * count + c, gl.int64) * height
            p_out = out_ptr + ((page + row) * width)[:, None] + (n + o_n)[None, :]
            gl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=(row < height)[:, None])
        else:
            col = (c - first) * width + n
            if BIAS:
                acc += bias.to(gl.float32)[None, :]
            tma.store_wait(0)
            out_smem.index(group).store(acc.to(out_desc.dtype))
            fence_async_shared()
            store(out_desc, [m * 128 + group * 64, col], out_smem.index(group))
    if KIND != "weights":
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["order", "negative", "depth", "height", "steps", "chunk", "tiles", "tiles_m"]
)
def product_kernel(
    left_desc,  # output: x [M, 4·I]; input: g [M, 4·O]; weights: x; blocks of [64, 64]
    right0_desc,  # the weights [I, O], blocks of [64, BN], for "input" of [BN, 64]
    right1_desc,
    right2_desc,
    right3_desc,  # weights: only the first, g [M, 4·O], blocks of [64, BN]
    out_desc,  # output: y [M, 4·O]; input: dx; blocks of [64, BN]; weights: None
    out_ptr,  # weights: [splits, 4, I, O]
    bias_ptr,  # [4·O] or None
    sums_ptr,  # input: [row blocks of 64, 4·O] fp32, column sums of g; or None
    order,  # which component of the left factor comes when: 2 bits a term, 8 a component
    negative,  # how many of the terms are negative: 4 bits a component
    first,  # first component of the result
    count,  # how many of them
    depth,  # of one component: what is reduced
    height,  # weights: I
    width,  # of one component of the result
    steps,  # of 64 along the depth (weights: along a split's rows)
    chunk,  # so many of them for all terms before the next
    tiles,
    tiles_m,  # weights: along I
    tiles_n,
    TERMS: gl.constexpr,
    SKIPPED: gl.constexpr,  # components that the left factor lacks: 2 for a zero half
    KIND: gl.constexpr,  # "output", "input" or "weights"
    BIAS: gl.constexpr,
    SUMS: gl.constexpr,
    STAGES: gl.constexpr,
    BN: gl.constexpr,
    PDL: gl.constexpr,
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: gl.constexpr = left_desc.dtype
    left_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], left_desc.layout)
    right_ring = gl.allocate_shared_memory(
        dtype,
        [STAGES] + right0_desc.block_type.shape,  # noqa: RUF005
        right0_desc.layout,
    )
    out_smem = left_ring
    if KIND != "weights":
        out_smem = gl.allocate_shared_memory(dtype, [2, 64, BN], out_desc.layout)
    ones_smem = left_ring
    if SUMS:
        ones_smem = gl.allocate_shared_memory(dtype, [2, 8, 64], left_desc.layout)
    full_bars, empty_bars = ring_barriers(STAGES, 2)
    fence_async_shared()
    # fmt: off
    copy = (
        left_desc, right0_desc, right1_desc, right2_desc, right3_desc, left_ring, right_ring,
        full_bars, empty_bars, order, first, count, depth, height, width, steps, chunk, tiles,
        tiles_m, tiles_n,
    )
    multiply = (
        out_desc, out_ptr, bias_ptr, left_ring, right_ring, out_smem, full_bars, empty_bars,
        negative, first, count, height, width, steps, chunk, tiles, tiles_m, tiles_n, sums_ptr,
        ones_smem, order, depth,
    )
    # fmt: on
    gl.warp_specialize(
        [
            (_multiply, (0, multiply, TERMS, KIND, BIAS, SUMS, STAGES, BN)),
            (_multiply, (1, multiply, TERMS, KIND, BIAS, SUMS, STAGES, BN)),
            (_copy, (copy, TERMS, SKIPPED, KIND, STAGES, BN)),
        ],
        [4, 1],
        [232, 40],
    )
