"""The residual MLP's product with GELU behind it, for Hopper, and the one with its derivative.

Two groups of four warps multiply, each 64 rows by 256 columns of a tile, and leave their result in
shared memory in the dtype of the tensors. A third group takes it from there, through GELU to
memory, while the two go on with the next tile: GELU takes a third of a product's time in
instructions, and warps that do both leave the tensor cores waiting.

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

from fastadapt.kernels.hopper import accumulator_layout, load, store


@dataclass(frozen=True)
class Product:
    """A variant of ``product_kernel``."""

    backward: bool  # the product is the gradient of GELU's output; the weight is [depth, width]
    save: bool  # forward: the product itself is stored as well
    sums: bool  # backward: also the column sums of the gradient of h
    stages: int = 3  # of the ring


@gluon.constexpr_function
def _finish_layout():
    """Of 64 x 64 numbers: each thread has 8 columns, 16 bytes, of four rows."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def _wait(bars, i, v: gl.constexpr):
    """Until the barrier of item i's slot was passed for item i."""
    mbarrier.wait(bars.index(i % v.stages), (i // v.stages) & 1)


@gluon.jit
def _fill(i, args, v: gl.constexpr):
    """Starts the copies of item i: 64 columns of a tile of x, and what they meet of the weight."""
    x_desc, w_desc, x_ring, w_ring, full_bars = args[0], args[1], args[2], args[3], args[4]
    steps, across = args[5], args[6]
    slot = i % v.stages
    full = full_bars.index(slot)
    tile = gl.program_id(0) + i // steps * gl.num_programs(0)
    k = i % steps * 64
    row = tile // across * 128
    col = tile % across * 256
    mbarrier.expect(full, (128 + 256) * 64 * 2)
    load(x_desc, [row, k], full, x_ring.index(2 * slot))
    load(x_desc, [row + 64, k], full, x_ring.index(2 * slot + 1))
    if v.backward:
        load(w_desc, [k, col], full, w_ring.index(slot))
    else:
        load(w_desc, [col, k], full, w_ring.index(slot))


@gluon.jit
def _halves(t):
    """The left and the right half of t's columns: no data moves, they lie in registers."""
    COLS: gl.constexpr = t.type.shape[1]
    return t.reshape([64, 2, COLS // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _multiply(group: gl.constexpr, args, fill, v: gl.constexpr):
    """The products of 64 rows of each tile."""
    x_ring, w_ring, full_bars, empty_bars = args[0], args[1], args[2], args[3]
    tile_smem, done_bars, taken_bars = args[4], args[5], args[6]
    steps, tiles = args[7], args[8]
    dtype: gl.constexpr = tile_smem.dtype
    layout: gl.constexpr = accumulator_layout(256)
    mine = (tiles - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    items = mine * steps
    if group == 0:
        for i in gl.static_range(gl.constexpr(v.stages)):
            if i < items:
                _fill(i, fill, v)
    i = 0
    for n in range(mine):
        acc = gl.zeros([64, 256], gl.float32, layout)
        for _ in range(steps):
            _wait(full_bars, i, v)
            x = x_ring.index(2 * (i % v.stages) + group)
            w = w_ring.index(i % v.stages)
            if not v.backward:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x, w, acc, is_async=True)
            if group == 0 and i > 0 and i - 1 + v.stages < items:
                _wait(empty_bars, i - 1, v)
                _fill(i - 1 + v.stages, fill, v)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty_bars.index(i % v.stages), count=1)
            i += 1
        # Of a fresh barrier the phase before the first is over.
        mbarrier.wait(taken_bars.index(group), (n & 1) ^ 1)
        left, right = _halves(acc.to(dtype))
        t0, t1 = _halves(left)
        t2, t3 = _halves(right)
        tile_smem.index(4 * group).store(t0)
        tile_smem.index(4 * group + 1).store(t1)
        tile_smem.index(4 * group + 2).store(t2)
        tile_smem.index(4 * group + 3).store(t3)
        fence_async_shared()
        mbarrier.arrive(done_bars.index(group), count=1)


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
    e = _approximately("ex2", h * h * -0.7213475204444817)
    t = _approximately("rcp", 1.0 + (0.3275911 * 0.7071067811865476) * size)
    p = t * 0.5307027145 - 0.7265760135
    p = p * t + 0.7107068705
    p = p * t - 0.142248368
    p = p * t + 0.127414796
    return size, e, p * t * e


@gluon.jit
def _finish(args, v: gl.constexpr):
    """What becomes of the products: GELU, or its derivative times them, to memory."""
    h_desc, out_desc, h_ptr, bias_ptr, sums_ptr = args[0], args[1], args[2], args[3], args[4]
    tile_smem, out_smem, done_bars, taken_bars = args[5], args[6], args[7], args[8]
    rows, width, tiles, across = args[9], args[10], args[11], args[12]
    layout: gl.constexpr = _finish_layout()
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for group in gl.static_range(2):
            row = tile // across * 128 + group * 64
            for quarter in gl.static_range(4):
                col = tile % across * 256 + quarter * 64
                m_n = col + o_n < width
                bias = gl.load(bias_ptr + col + o_n, mask=m_n, other=0.0).to(gl.float32)
                if v.backward:
                    # On its way while the product is waited for.
                    p_h = h_ptr + gl.cast(row + o_m, gl.int64)[:, None] * width
                    m_h = (row + o_m < rows)[:, None] & m_n[None, :]
                    h = gl.load(p_h + (col + o_n)[None, :], mask=m_h, other=0.0)
                if quarter == 0:
                    mbarrier.wait(done_bars.index(group), phase)
                smem = tile_smem.index(4 * group + quarter)
                if v.backward:
                    size, e, beyond = _beyond(h.to(gl.float32) + bias[None, :])
                    h = h.to(gl.float32) + bias[None, :]
                    below = gl.where(h < 0, beyond, 1.0 - beyond)
                    # Rows beyond the last are zero in the product.
                    out = smem.load(layout).to(gl.float32) * (below + h * e * 0.3989422804014327)
                    if v.sums:
                        unit = tile // across * 2 + group
                        p_sums = sums_ptr + gl.cast(unit, gl.int64) * width + col + o_n
                        gl.store(p_sums, gl.sum(out, 0), mask=m_n)
                    tma.store_wait(1)
                else:
                    if v.save:
                        store(h_desc, [row, col], smem)
                    h = smem.load(layout).to(gl.float32) + bias[None, :]
                    size, e, beyond = _beyond(h)
                    out = gl.maximum(h, 0.0) - beyond * size
                    tma.store_wait(3 if v.save else 1)
                buffer = out_smem.index(quarter % 2)
                buffer.store(out.to(out_desc.dtype))
                fence_async_shared()
                store(out_desc, [row, col], buffer)
            if v.save:
                tma.store_wait(1)  # the product has been read
            mbarrier.arrive(taken_bars.index(group), count=1)
        phase ^= 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "depth", "width", "tiles", "across"])
def product_kernel(
    x_desc,  # [rows, depth], blocks of [64, 64]
    w_desc,  # [width, depth], blocks of [256, 64]; backward: [depth, width], [64, 256]
    h_desc,  # [rows, width], blocks of [64, 64]: the product; None without save
    out_desc,  # the same: gelu(product + bias); backward: product · gelu'(h + bias)
    h_ptr,  # backward: [rows, width]
    bias_ptr,  # [width]
    sums_ptr,  # [row blocks of 64, width] fp32: out's column sums; None without sums
    rows,
    depth,
    width,
    tiles,
    across,  # tiles side by side
    v: gl.constexpr,  # Product
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x_ring = gl.allocate_shared_memory(dtype, [2 * v.stages, 64, 64], x_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [v.stages] + w_desc.block_type.shape, w_desc.layout)  # noqa: RUF005
    tile_smem = gl.allocate_shared_memory(dtype, [8, 64, 64], out_desc.layout)
    out_smem = gl.allocate_shared_memory(dtype, [2, 64, 64], out_desc.layout)
    full_bars = gl.allocate_shared_memory(gl.int64, [v.stages, 1], mbarrier.MBarrierLayout())
    empty_bars = gl.allocate_shared_memory(gl.int64, [v.stages, 1], mbarrier.MBarrierLayout())
    done_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(gl.constexpr(v.stages)):
        mbarrier.init(full_bars.index(i), count=1)
        mbarrier.init(empty_bars.index(i), count=2)
    for group in gl.static_range(2):
        mbarrier.init(done_bars.index(group), count=1)
        mbarrier.init(taken_bars.index(group), count=1)
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
        h_desc, out_desc, h_ptr, bias_ptr, sums_ptr, tile_smem, out_smem, done_bars, taken_bars,
        rows, width, tiles, across,
    )
    # fmt: on
    gl.warp_specialize(
        [
            (_multiply, (0, multiply, fill, v)),
            (_multiply, (1, multiply, fill, v)),
            (_finish, (finish, v)),
        ],
        [4, 4],
        [168, 168],
    )
