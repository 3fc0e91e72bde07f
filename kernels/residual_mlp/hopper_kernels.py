"""The residual MLP's product with GELU behind it, for Hopper, and the one that meets its slope.

Two groups of four warps multiply, each 64 rows by 256 columns of a tile, and leave their result in
shared memory in the dtype of the tensors. A third group takes it from there, through GELU or times
the slope, to memory, while the two go on with the next tile: GELU takes a third of a product's
time in instructions, and warps that do both leave the tensor cores waiting.

The tiles of the factors come through a ring that the first group refills. A program handles one
tile after the other.
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

from ..common.gluon_hopper import accumulator_layout, halves, load, ring_barriers, store, wait_for
from .triton_kernels import HALF_LOG2_E, INVERSE_SQRT_TAU, SQRT_HALF, TAIL_SCALE, tail


@dataclass(frozen=True)
class Product:
    """A variant of ``product_kernel``."""

    backward: bool  # the product is the gradient of GELU's output; the weight is [depth, width]
    save: bool  # forward: GELU's slope is stored as well
    sums: bool  # backward: also the column sums of the gradient of h
    stages: int = 3  # of the ring


@gluon.constexpr_function
def _finish_layout():
    """Of 64 x 64 numbers: each thread has 8 columns, 16 bytes, of four rows."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def _place(n, across):
    """The first row and column of this program's n-th tile."""
    tile = gl.program_id(0) + n * gl.num_programs(0)
    return tile // across * 128, tile % across * 256


@gluon.jit
def _count(tiles):
    """The number of this program's tiles."""
    return (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def _fill(i, args, v: gl.constexpr):
    """Starts the copies of item i: 64 columns of a tile of x, and what they meet of the weight."""
    x_desc, w_desc, x_ring, w_ring, full_bars, steps, across = args
    slot = i % v.stages
    full = full_bars.index(slot)
    row, col = _place(i // steps, across)
    k = i % steps * 64
    mbarrier.expect(full, (128 + 256) * 64 * 2)
    load(x_desc, [row, k], full, x_ring.index(2 * slot))
    load(x_desc, [row + 64, k], full, x_ring.index(2 * slot + 1))
    if v.backward:
        load(w_desc, [k, col], full, w_ring.index(slot))
    else:
        load(w_desc, [col, k], full, w_ring.index(slot))


@gluon.jit
def _refill(i, items, empty_bars, args, v: gl.constexpr):
    """Fills the slot of item i again, as soon as both groups are done with it."""
    if i + v.stages < items:
        wait_for(empty_bars, i, v)
        _fill(i + v.stages, args, v)


@gluon.jit
def _multiply(group: gl.constexpr, args, fill, v: gl.constexpr):
    """The products of 64 rows of each tile."""
    x_ring, w_ring, full_bars, empty_bars, tile_smem, done_bars, taken_bars, steps, tiles = args
    dtype: gl.constexpr = tile_smem.dtype
    layout: gl.constexpr = accumulator_layout(256)
    mine = _count(tiles)
    items = mine * steps
    if group == 0:
        for i in gl.static_range(gl.constexpr(v.stages)):
            if i < items:
                _fill(i, fill, v)
    i = 0
    for n in range(mine):
        acc = gl.zeros([64, 256], gl.float32, layout)
        for k in range(steps):
            wait_for(full_bars, i, v)
            x = x_ring.index(2 * (i % v.stages) + group)
            w = w_ring.index(i % v.stages)
            if not v.backward:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x, w, acc, is_async=True)
            if group == 0 and k > 0:
                _refill(i - 1, items, empty_bars, fill, v)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty_bars.index(i % v.stages), count=1)
            i += 1
        if group == 0:  # the other group needs it before this one is back
            _refill(i - 1, items, empty_bars, fill, v)
        # Of a fresh barrier the phase before the first is over.
        mbarrier.wait(taken_bars.index(group), (n & 1) ^ 1)
        left, right = halves(acc.to(dtype))
        t0, t1 = halves(left)
        t2, t3 = halves(right)
        tile_smem.index(4 * group).store(t0)
        tile_smem.index(4 * group + 1).store(t1)
        tile_smem.index(4 * group + 2).store(t2)
        tile_smem.index(4 * group + 3).store(t3)
        fence_async_shared()
        mbarrier.arrive(done_bars.index(group), count=1)


_tail = gluon.jit(tail.fn)  # the same code in Gluon


@gluon.jit
def _approximately(NAME: gl.constexpr, x):
    """Two of the hardware's functions, without a detour for subnormal numbers."""
    asm: gl.constexpr = NAME + ".approx.ftz.f32 $0, $1;"
    return gl.inline_asm_elementwise(asm, "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _beyond(h):
    """|h|, exp(−h² / 2), and the normal distribution's integral beyond |h|: as in ``_normal`` of
    the plain kernels, in fewer instructions."""
    size = gl.minimum(gl.abs(h), 1e4)  # 0 · ∞ would be no number
    e = _approximately("ex2", h * h * -HALF_LOG2_E)
    t = _approximately("rcp", 1.0 + (TAIL_SCALE * SQRT_HALF) * size)
    return size, e, _tail(t) * e


@gluon.jit
def _load_bias(bias_ptr, col, width, layout: gl.constexpr):
    """Of a tile's columns, in quarters."""
    o_n = col + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    b0 = gl.load(bias_ptr + o_n, mask=o_n < width, other=0.0)
    b1 = gl.load(bias_ptr + o_n + 64, mask=o_n + 64 < width, other=0.0)
    b2 = gl.load(bias_ptr + o_n + 128, mask=o_n + 128 < width, other=0.0)
    b3 = gl.load(bias_ptr + o_n + 192, mask=o_n + 192 < width, other=0.0)
    return b0, b1, b2, b3


@gluon.jit
def _finish_forward(args, v: gl.constexpr):
    """GELU of the products, and its slope, to memory."""
    slope_desc, out_desc, bias_ptr, _, tile_smem, side_smem = args[0]
    done_bars, taken_bars, _ = args[1]
    width, tiles, across, _ = args[2]
    layout: gl.constexpr = _finish_layout()
    _, col = _place(0, across)
    b0, b1, b2, b3 = _load_bias(bias_ptr, col, width, layout)
    mine = _count(tiles)
    for n in range(mine):
        row, col = _place(n, across)
        _, next_col = _place(n + 1, across)  # on its way meanwhile
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
                size, e, beyond = _beyond(h)
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
    """Starts the copy of the slopes of this program's i-th 64 x 64 numbers."""
    row, col = _place(i // 8, across)
    bar = slope_bars.index(i % 2)
    mbarrier.expect(bar, 64 * 64 * 2)
    load(slope_desc, [row + i // 4 % 2 * 64, col + i % 4 * 64], bar, side_smem.index(i % 2))


@gluon.jit
def _finish_backward(args, v: gl.constexpr):
    """The products times GELU's slope, to memory, and their column sums."""
    slope_desc, out_desc, _, sums_ptr, tile_smem, side_smem = args[0]
    done_bars, taken_bars, slope_bars = args[1]
    width, tiles, across, units = args[2]
    layout: gl.constexpr = _finish_layout()
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    mine = _count(tiles)
    _fill_slope(0, slope_desc, side_smem, slope_bars, across)
    _fill_slope(1, slope_desc, side_smem, slope_bars, across)
    # Of each quarter 16 rows, those that the threads have next to each other added up.
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
        # In rows of programs as long as those of tiles, a program's columns stay the same.
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
    gl.store(ptr + o_n, gl.convert_layout(gl.sum(sums, 0), o_n.type.layout), mask=o_n < cols)


@gluon.jit(do_not_specialize=["depth", "width", "tiles", "across", "units"])
def product_kernel(
    x_desc,  # [rows, depth], blocks of [64, 64]
    w_desc,  # [width, depth], blocks of [256, 64]; backward: [depth, width], [64, 256]
    slope_desc,  # [rows, width] fp16, blocks of [64, 64]: gelu'(product + bias), or None
    out_desc,  # [rows, width], the same: gelu(product + bias); backward: product · slope
    bias_ptr,  # forward: [width]
    sums_ptr,  # [units, width] fp32: shares of out's column sums; None without sums
    depth,
    width,
    tiles,
    across,  # tiles side by side
    units,  # programs that work down the same columns; tiles one below the other if these change
    v: gl.constexpr,  # Product
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x_ring = gl.allocate_shared_memory(dtype, [2 * v.stages, 64, 64], x_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [v.stages] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
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
    fill = (x_desc, w_desc, x_ring, w_ring, full_bars, steps, across)
    # fmt: off
    multiply = (
        x_ring, w_ring, full_bars, empty_bars, tile_smem, done_bars, taken_bars, steps, tiles,
    )
    finish = (
        (slope_desc, out_desc, bias_ptr, sums_ptr, tile_smem, side_smem),
        (done_bars, taken_bars, slope_bars),
        (width, tiles, across, units),
    )
    # fmt: on
    gl.warp_specialize(
        [
            (_multiply, (0, multiply, fill, v)),
            (_multiply, (1, multiply, fill, v)),
            (_finish_backward if v.backward else _finish_forward, (finish, v)),
        ],
        [4, 4],
        [168, 168],
    )
