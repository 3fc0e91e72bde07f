"""Hopper's kernel of the residual MLP: a product whose epilogue is GELU, or GELU's slope.

Forward, for x [M, C], weight [H, C] and bias [H]:

    (1)  out   = gelu(x · weightᵀ + bias)                [M, H]
    (2)  slope = slope of gelu at x · weightᵀ + bias     [M, H] fp16

Backward, for x = g [M, C], weight [C, H] and that slope:

    (3)  out   = (x · weight) ∘ slope                    [M, H],  sums = column sums of out

The kernel is persistent: a program computes one tile of 128 × 256 after the other. Two consumer
groups of four warps multiply, each 64 × 256 of a tile, and leave the product in shared memory in
the dtype of the tensors. A third group of four warps, the epilogue, takes it from there to memory,
while the two go on with the next tile: GELU takes a third of a product's time in instructions, and
warps that do both leave the tensor cores waiting. The factors' tiles come through a ring buffer,
which the first consumer group refills.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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

from ..common.gluon_hopper import accumulator_layout, halves, load, ring_barriers, store, wait_for
from .triton_kernels import HALF_LOG2_E, INVERSE_SQRT_TAU, SQRT_HALF, TAIL_SCALE, tail


@dataclass(frozen=True)
class ProductGelu:
    """A variant of :func:`product_gelu_kernel`."""

    backward: bool  # equation (3); the weight is [depth, width]
    save: bool  # forward: equation (2), too
    sums: bool  # backward: the sums, too
    stages: int = 3  # of the ring buffer


class Ring(NamedTuple):
    """The ring buffer of the factors' tiles."""

    x_smem: object  # [2 · stages, 64, 64]: two halves for each slot
    w_smem: object  # [stages, 256, 64]; backward: [stages, 64, 256]
    full_bars: object  # a slot's copies have arrived
    empty_bars: object  # both consumer groups are done with a slot


class Source(NamedTuple):
    """Where the ring buffer is filled from."""

    x_desc: object
    w_desc: object
    steps: object  # of 64 along the depth
    across: object  # tiles side by side


class Handover(NamedTuple):
    """Products on their way from the consumer groups to the epilogue."""

    tile_smem: object  # [8, 64, 64]: four quarters of 64 columns for each group
    done_bars: object  # a group has stored its products
    taken_bars: object  # the epilogue has read them


class Epilogue(NamedTuple):
    """What the epilogue reads and writes."""

    slope_desc: object
    out_desc: object
    bias_ptr: object
    sums_ptr: object
    side_smem: object  # [2, 64, 64] fp16: slopes on their way
    slope_bars: object  # backward: slopes have arrived


class Tiles(NamedTuple):
    """How the result is cut into tiles."""

    width: object  # of the result
    total: object
    across: object  # side by side
    units: object  # see the kernel


@gluon.constexpr_function
def _epilogue_layout():
    """Lay out 64 × 64 numbers: each thread has 8 columns, 16 bytes, of four rows."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def _place(n, across):
    """Compute the first row and column of this program's n-th tile."""
    tile = gl.program_id(0) + n * gl.num_programs(0)
    return tile // across * 128, tile % across * 256


@gluon.jit
def _count(tiles):
    """Count this program's tiles."""
    return (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _fill(i, ring, source, v: gl.constexpr):
    """Start the copies of item i: 64 columns of a tile of x, and the weight's part for them."""
    slot = i % v.stages
    full = ring.full_bars.index(slot)
    row, col = _place(i // source.steps, source.across)
    k = i % source.steps * 64
    mbarrier.expect(full, (128 + 256) * 64 * 2)
    load(source.x_desc, [row, k], full, ring.x_smem.index(2 * slot))
    load(source.x_desc, [row + 64, k], full, ring.x_smem.index(2 * slot + 1))
    if v.backward:
        load(source.w_desc, [k, col], full, ring.w_smem.index(slot))
    else:
        load(source.w_desc, [col, k], full, ring.w_smem.index(slot))


@gluon.jit
def _refill(i, items, ring, source, v: gl.constexpr):
    """Fill the slot of item i again, as soon as both groups are done with it."""
    if i + v.stages < items:
        wait_for(ring.empty_bars, i, v)
        _fill(i + v.stages, ring, source, v)


@gluon.jit
def _multiply(group: gl.constexpr, ring, source, handover, tiles, v: gl.constexpr):
    """Multiply 64 rows of each tile: one consumer group."""
    dtype: gl.constexpr = handover.tile_smem.dtype
    layout: gl.constexpr = accumulator_layout(256)
    steps = source.steps
    mine = _count(tiles.total)
    items = mine * steps
    if group == 0:
        for i in gl.static_range(gl.constexpr(v.stages)):
            if i < items:
                _fill(i, ring, source, v)
    i = 0
    for n in range(mine):
        acc = gl.zeros([64, 256], gl.float32, layout)
        for k in range(steps):
            wait_for(ring.full_bars, i, v)
            x = ring.x_smem.index(2 * (i % v.stages) + group)
            w = ring.w_smem.index(i % v.stages)
            if not v.backward:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x, w, acc, is_async=True)
            if group == 0 and k > 0:
                _refill(i - 1, items, ring, source, v)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(ring.empty_bars.index(i % v.stages), count=1)
            i += 1
        if group == 0:  # the other group needs it before this one is back
            _refill(i - 1, items, ring, source, v)
        # Of a fresh barrier the phase before the first is over.
        mbarrier.wait(handover.taken_bars.index(group), (n & 1) ^ 1)
        left, right = halves(acc.to(dtype))
        t0, t1 = halves(left)
        t2, t3 = halves(right)
        handover.tile_smem.index(4 * group).store(t0)
        handover.tile_smem.index(4 * group + 1).store(t1)
        handover.tile_smem.index(4 * group + 2).store(t2)
        handover.tile_smem.index(4 * group + 3).store(t3)
        fence_async_shared()
        mbarrier.arrive(handover.done_bars.index(group), count=1)


_tail = gluon.jit(tail.fn)  # the same code in Gluon


@gluon.jit
def _approximately(NAME: gl.constexpr, x):
    """Evaluate one of the hardware's functions, without a detour for subnormal numbers."""
    asm: gl.constexpr = NAME + ".approx.ftz.f32 $0, $1;"
    return gl.inline_asm_elementwise(asm, "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _normal_tail(h):
    """Compute |h|, exp(−h² / 2) and the normal distribution's integral from |h| on.

    As ``normal_integral`` of the plain kernels, in fewer instructions.
    """
    size = gl.minimum(gl.abs(h), 1e4)  # 0 · ∞ would be no number
    e = _approximately("ex2", h * h * -HALF_LOG2_E)
    t = _approximately("rcp", 1.0 + (TAIL_SCALE * SQRT_HALF) * size)
    return size, e, _tail(t) * e


@gluon.jit
def _load_bias(bias_ptr, col, width, layout: gl.constexpr):
    """Load the bias of a tile's columns, in quarters."""
    o_n = col + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    b0 = gl.load(bias_ptr + o_n, mask=o_n < width, other=0.0)
    b1 = gl.load(bias_ptr + o_n + 64, mask=o_n + 64 < width, other=0.0)
    b2 = gl.load(bias_ptr + o_n + 128, mask=o_n + 128 < width, other=0.0)
    b3 = gl.load(bias_ptr + o_n + 192, mask=o_n + 192 < width, other=0.0)
    return b0, b1, b2, b3


@gluon.jit
def _forward_epilogue(handover, epilogue, tiles, v: gl.constexpr):
    """Write GELU of the products, and its slope, to memory."""
    tile_smem, done_bars, taken_bars = handover.tile_smem, handover.done_bars, handover.taken_bars
    slope_desc, out_desc, bias_ptr = epilogue.slope_desc, epilogue.out_desc, epilogue.bias_ptr
    side_smem = epilogue.side_smem
    width, across = tiles.width, tiles.across
    layout: gl.constexpr = _epilogue_layout()
    _, col = _place(0, across)
    b0, b1, b2, b3 = _load_bias(bias_ptr, col, width, layout)
    mine = _count(tiles.total)
    for n in range(mine):
        row, col = _place(n, across)
        _, next_col = _place(n + 1, across)  # prefetched
        next0, next1, next2, next3 = _load_bias(bias_ptr, next_col, width, layout)
        for group in gl.static_range(2):
            mbarrier.wait(done_bars.index(group), n & 1)
            for quarter in gl.static_range(4):
                if quarter == 0:
                    bias = b0
                elif quarter == 1:
                    bias = b1
                elif quarter == 2:
                    bias = b2
                else:
                    bias = b3
                smem = tile_smem.index(4 * group + quarter)
                h = smem.load(layout).to(gl.float32) + bias.to(gl.float32)[None, :]
                size, e, beyond = _normal_tail(h)
                out = gl.maximum(h, 0.0) - beyond * size
                if v.save:
                    slope = gl.where(h < 0, beyond, 1.0 - beyond) + h * e * INVERSE_SQRT_TAU
                    tma.store_wait(2)  # the slope before the last has been read
                    side_smem.index(quarter % 2).store(slope.to(gl.float16))
                smem.store(out.to(out_desc.dtype))  # where each thread has read it
                fence_async_shared()
                place = [row + group * 64, col + quarter * 64]
                store(out_desc, place, smem)
                if v.save:
                    store(slope_desc, place, side_smem.index(quarter % 2))
                if group == 1 and quarter == 0:
                    tma.store_wait(2 if v.save else 1)
                    mbarrier.arrive(taken_bars.index(0), count=1)
        tma.store_wait(1 if v.save else 0)
        mbarrier.arrive(taken_bars.index(1), count=1)
        b0, b1, b2, b3 = next0, next1, next2, next3


@gluon.jit
def _fill_slope(i, slope_desc, side_smem, slope_bars, across):
    """Start the copy of the slopes of this program's i-th 64 × 64 numbers."""
    row, col = _place(i // 8, across)
    bar = slope_bars.index(i % 2)
    mbarrier.expect(bar, 64 * 64 * 2)
    load(slope_desc, [row + i // 4 % 2 * 64, col + i % 4 * 64], bar, side_smem.index(i % 2))


@gluon.jit
def _backward_epilogue(handover, epilogue, tiles, v: gl.constexpr):
    """Write the products times GELU's slope to memory, and their column sums."""
    tile_smem, done_bars, taken_bars = handover.tile_smem, handover.done_bars, handover.taken_bars
    slope_desc, out_desc, sums_ptr = epilogue.slope_desc, epilogue.out_desc, epilogue.sums_ptr
    side_smem, slope_bars = epilogue.side_smem, epilogue.slope_bars
    width, across, units = tiles.width, tiles.across, tiles.units
    layout: gl.constexpr = _epilogue_layout()
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    mine = _count(tiles.total)
    _fill_slope(0, slope_desc, side_smem, slope_bars, across)
    _fill_slope(1, slope_desc, side_smem, slope_bars, across)
    # 16 rows of sums for each quarter: the rows of one thread are added up.
    zeros = gl.sum(gl.zeros([64, 64], gl.float32, layout).reshape([4, 16, 64]), 0)
    s0, s1, s2, s3 = zeros, zeros, zeros, zeros
    for n in range(mine):
        row, col = _place(n, across)
        for group in gl.static_range(2):
            for quarter in gl.static_range(4):
                if quarter == 0:
                    mbarrier.wait(done_bars.index(group), n & 1)
                mbarrier.wait(slope_bars.index(quarter % 2), quarter // 2)
                slope = side_smem.index(quarter % 2).load(layout)
                smem = tile_smem.index(4 * group + quarter)
                out = smem.load(layout).to(gl.float32) * slope.to(gl.float32)
                smem.store(out.to(out_desc.dtype))  # where each thread has read it
                fence_async_shared()  # and all threads have their slopes
                store(out_desc, [row + group * 64, col + quarter * 64], smem)
                i = 8 * n + 4 * group + quarter + 2
                if i < 8 * mine:
                    _fill_slope(i, slope_desc, side_smem, slope_bars, across)
                if v.sums:
                    # Rows beyond the last are zero in the product.
                    part = gl.sum(out.reshape([4, 16, 64]), 0)
                    if quarter == 0:
                        s0 += part
                    elif quarter == 1:
                        s1 += part
                    elif quarter == 2:
                        s2 += part
                    else:
                        s3 += part
                if group == 1 and quarter == 0:
                    tma.store_wait(1)
                    mbarrier.arrive(taken_bars.index(0), count=1)
        tma.store_wait(0)
        mbarrier.arrive(taken_bars.index(1), count=1)
        # A program keeps its columns where the programs are a multiple of the tiles across.
        if v.sums and (n == mine - 1 or gl.num_programs(0) % across != 0):
            unit = row // 128 % units
            p_sums = sums_ptr + gl.cast(unit, gl.int64) * width + col
            _store_sums(p_sums, width - col, s0, o_n)
            _store_sums(p_sums + 64, width - col - 64, s1, o_n)
            _store_sums(p_sums + 128, width - col - 128, s2, o_n)
            _store_sums(p_sums + 192, width - col - 192, s3, o_n)
            s0, s1, s2, s3 = zeros, zeros, zeros, zeros


@gluon.jit
def _store_sums(ptr, cols, sums, o_n):
    """Store the sums of 16 rows each, added up, where the columns lie within the result."""
    gl.store(ptr + o_n, gl.convert_layout(gl.sum(sums, 0), o_n.type.layout), mask=o_n < cols)


@gluon.jit(do_not_specialize=["depth", "width", "tiles", "across", "units"])
def product_gelu_kernel(
    x_desc,  # [rows, depth], blocks of [64, 64]
    w_desc,  # [width, depth], blocks of [256, 64]; backward: [depth, width], [64, 256]
    slope_desc,  # [rows, width] fp16, blocks of [64, 64]: equation (2), or None
    out_desc,  # [rows, width], the same blocks: equation (1); backward: (3)
    bias_ptr,  # forward: [width]
    sums_ptr,  # [units, width] fp32: partials of out's column sums; None without sums
    depth,
    width,
    tiles,
    across,  # tiles side by side
    units,  # programs that work down the same columns; tiles one below the other if these change
    v: gl.constexpr,  # ProductGelu
    PDL: gl.constexpr,
):
    """Multiply x with the weight; the epilogue applies GELU, or its slope."""
    dtype: gl.constexpr = x_desc.dtype
    x_smem = gl.allocate_shared_memory(dtype, [2 * v.stages, 64, 64], x_desc.layout)
    w_smem = gl.allocate_shared_memory(dtype, [v.stages] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    tile_smem = gl.allocate_shared_memory(dtype, [8, 64, 64], out_desc.layout)
    side_smem = gl.allocate_shared_memory(gl.float16, [2, 64, 64], out_desc.layout)
    full_bars, empty_bars = ring_barriers(v.stages, 2)
    done_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    slope_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(done_bars.index(i), count=1)
        mbarrier.init(taken_bars.index(i), count=1)
        mbarrier.init(slope_bars.index(i), count=1)
    fence_async_shared()
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    steps = (depth + 63) // 64
    ring = Ring(x_smem, w_smem, full_bars, empty_bars)
    source = Source(x_desc, w_desc, steps, across)
    handover = Handover(tile_smem, done_bars, taken_bars)
    epilogue = Epilogue(slope_desc, out_desc, bias_ptr, sums_ptr, side_smem, slope_bars)
    cut = Tiles(width, tiles, across, units)
    gl.warp_specialize(
        [
            (_multiply, (0, ring, source, handover, cut, v)),
            (_multiply, (1, ring, source, handover, cut, v)),
            (_backward_epilogue if v.backward else _forward_epilogue, (handover, epilogue, cut, v)),
        ],
        [4, 4],
        [168, 168],
    )
