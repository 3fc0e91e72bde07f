"""Hopper's kernel of quaternion layers: large Hamilton products with specialized warps.

A component of the result is a sum over four (with a zero half, two) products of one component of
the left factor with one of the right, whose number is the exclusive or of the other two:

    (1)  out[c] = sum over a of sign(a, c) · left[a] @ right[a ^ c]

so that a layer is a dense product that picks its tiles: no larger matrix is ever built. Products
with a negative sign come first, after which the accumulator's sign is turned once
(:mod:`.hamilton_terms`). Kinds of products:

    "output"    left x [M, 4·I],    right the weights [I, O] each,   out y [M, 4·O]
    "input"     left g [M, 4·O],    right the weights, transposed,   out dx [M, 4·I]
    "weights"   left xᵀ [4·I, M],   right g [M, 4·O],                out 4 · [I, O]

The kernel is persistent: a program computes one tile of 128 rows after the other. One producer warp
copies tiles into a ring buffer, two consumer groups of four warps multiply, each 64 rows. The plain
kernels compute the same for every other case.
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

from ..common.gluon_hopper import accumulator_layout, load, ring_barriers, store


@dataclass(frozen=True)
class HamiltonProduct:
    """A variant of :func:`hamilton_product_kernel`."""

    kind: str  # "output", "input" or "weights"
    terms: int  # products of a component: 2 with a zero half, else 4
    bias: bool
    sums: bool  # "input": also the column sums of g
    stages: int  # of the ring buffer
    cols: int  # of a tile

    @property
    def of_input(self) -> bool:
        """Whether the product is the gradient of x."""
        return self.kind == "input"

    @property
    def of_weights(self) -> bool:
        """Whether the product is the weights' gradients."""
        return self.kind == "weights"

    @property
    def skipped(self) -> int:
        """Count the components that the left factor lacks: 2 for a zero half."""
        return 2 if self.terms == 2 else 0


class Operands(NamedTuple):
    """The factors, as bulk copies read them."""

    left: object
    right0: object
    right1: object
    right2: object
    right3: object


class Ring(NamedTuple):
    """The ring buffer of the factors' tiles."""

    left_smem: object  # [2 · stages, 64, 64]: two halves for each slot
    right_smem: object  # [stages, 64, cols]; "input": [stages, cols, 64]
    full_bars: object  # a slot's copies have arrived
    empty_bars: object  # both consumer groups are done with a slot


class Schedule(NamedTuple):
    """Which products make which tiles; see the kernel's arguments."""

    order: object
    negative: object
    first: object
    components: object
    depth: object
    height: object
    width: object
    steps: object
    chunk: object
    tiles: object
    tiles_m: object
    tiles_n: object


class Output(NamedTuple):
    """What the consumer groups read and write beside the ring buffer."""

    out_desc: object
    out_ptr: object
    bias_ptr: object
    sums_ptr: object
    out_smem: object  # [2, 64, cols]
    ones_smem: object  # [2, 8, 64]: ones, for the sums


class Sums(NamedTuple):
    """Where a group leaves the column sums of its rows of the left factor."""

    ones: object  # [8, 64]
    ptr: object  # [4 · depth]
    order: object  # of the component's terms
    steps: object
    depth: object


@gluon.jit
def _locate(tile, schedule, v: gl.constexpr):
    """Compute component, row block and column block of a tile.

    For the weights' gradients the row blocks of all splits are counted.
    """
    first, count, tiles_n = schedule.first, schedule.components, schedule.tiles_n
    if v.of_weights:
        c = tile % count
        rest = tile // count
        return first + c, rest // tiles_n, rest % tiles_n
    per_row = count * tiles_n
    rest = tile % per_row
    return first + rest // tiles_n, tile // per_row, rest % tiles_n


@gluon.jit
def _produce(operands, ring, schedule, v: gl.constexpr):
    """Copy tiles into the ring buffer: the producer warp."""
    left_desc, right0_desc, right1_desc = operands.left, operands.right0, operands.right1
    right2_desc, right3_desc = operands.right2, operands.right3
    left_smem, right_smem = ring.left_smem, ring.right_smem
    full_bars, empty_bars = ring.full_bars, ring.empty_bars
    order, depth, height, width = schedule.order, schedule.depth, schedule.height, schedule.width
    steps, chunk, tiles_m = schedule.steps, schedule.chunk, schedule.tiles_m
    slot = 0
    phase = 1  # of a fresh barrier: nothing to wait for
    for tile in range(gl.program_id(0), schedule.tiles, gl.num_programs(0)):
        c, m, n = _locate(tile, schedule, v)
        start = 0
        if v.of_weights:
            start = (m // tiles_m) * steps * 64
            m = m % tiles_m
        m = m * 128
        n = n * v.cols
        for turn in range(gl.cdiv(steps, chunk) * v.terms):
            a = (order >> (8 * c + 2 * (turn % v.terms))) & 3
            b = a ^ c
            done = turn // v.terms * chunk
            for step in range(done, gl.minimum(done + chunk, steps)):
                k = start + step * 64
                full = full_bars.index(slot)
                mbarrier.wait(empty_bars.index(slot), phase)
                mbarrier.expect(full, (128 + v.cols) * 64 * 2)
                right = right_smem.index(slot)
                if v.of_weights:
                    col = (a - v.skipped) * height + m
                    load(left_desc, [k, col], full, left_smem.index(2 * slot))
                    load(left_desc, [k, col + 64], full, left_smem.index(2 * slot + 1))
                    load(right0_desc, [k, b * width + n], full, right)
                else:
                    col = (a - v.skipped) * depth + k
                    load(left_desc, [m, col], full, left_smem.index(2 * slot))
                    load(left_desc, [m + 64, col], full, left_smem.index(2 * slot + 1))
                    row = k
                    col = n
                    if v.of_input:
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
                if slot == v.stages:
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
    sums,  # Sums; read with SUMS
    v: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Accumulate the products of the next ``steps`` pairs of tiles in the ring buffer.

    With SUMS store the left tiles' column sums as well.
    """
    left_smem, right_smem = ring.left_smem, ring.right_smem
    full_bars, empty_bars = ring.full_bars, ring.empty_bars
    before = 0
    for step in range(steps):
        mbarrier.wait(full_bars.index(slot), phase)
        left = left_smem.index(2 * slot + group)
        right = right_smem.index(slot)
        if v.of_weights:
            left = left.permute((1, 0))
        if v.of_input:
            right = right.permute((1, 0))
        if SUMS:
            # The sum over rows is a product with ones.
            zeros = gl.zeros([64, 8], gl.float32, accumulator_layout(8))
            ones = sums.ones.permute((1, 0))
            columns = warpgroup_mma(left.permute((1, 0)), ones, zeros, use_acc=False, is_async=True)
        acc = warpgroup_mma(left, right, acc, is_async=True)
        # Wait for the product before this one, and for the sums.
        if SUMS:
            acc, columns = warpgroup_mma_wait(1, [acc, columns])
            _put_sums(columns, sums, done + step)
        else:
            acc = warpgroup_mma_wait(1, [acc])
        if step > 0:
            mbarrier.arrive(empty_bars.index(before), count=1)
        before = slot
        slot += 1
        if slot == v.stages:
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
    v: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Subtract the products of the next ``minus`` steps and add those of the next ``plus``."""
    acc, slot, phase = _accumulate(group, -acc, minus, 0, ring, slot, phase, sums, v, SUMS)
    return _accumulate(group, -acc, plus, minus, ring, slot, phase, sums, v, SUMS)


@gluon.jit
def _put_sums(columns, sums, step):
    """Store the sums over a tile's rows, of 64 columns of the component whose turn it is."""
    a = (sums.order >> (2 * (step // sums.steps))) & 3
    layout: gl.constexpr = columns.type.layout
    o_k = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    first = gl.arange(0, 8, layout=gl.SliceLayout(0, layout)) == 0  # all eight are the same
    p_sums = sums.ptr + a * sums.depth + step % sums.steps * 64 + o_k
    gl.store(p_sums[:, None] + 0 * first.to(gl.int32)[None, :], columns, mask=first[None, :])


@gluon.jit
def _multiply(group: gl.constexpr, ring, output, schedule, v: gl.constexpr):
    """Multiply 64 rows of each tile, and write them: one consumer group."""
    out_desc, out_ptr, bias_ptr = output.out_desc, output.out_ptr, output.bias_ptr
    out_smem, ones_smem = output.out_smem, output.ones_smem
    first, count, height, width = (
        schedule.first,
        schedule.components,
        schedule.height,
        schedule.width,
    )
    steps, chunk, tiles_m, depth = schedule.steps, schedule.chunk, schedule.tiles_m, schedule.depth
    cols: gl.constexpr = v.cols  # Triton 3.6 takes no plain number in a shape
    layout: gl.constexpr = accumulator_layout(cols)
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    o_n = gl.arange(0, cols, layout=gl.SliceLayout(0, layout))
    slot = 0
    phase = 0
    if v.sums:
        ones_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        ones_smem.index(group).store(
            gl.full([8, 64], 1.0, gl.float32, ones_layout).to(ring.left_smem.dtype)
        )
        fence_async_shared()
    for tile in range(gl.program_id(0), schedule.tiles, gl.num_programs(0)):
        c, m, n = _locate(tile, schedule, v)
        if v.sums:
            unit = gl.cast(2 * m + group, gl.int64)
            sums = Sums(
                ones_smem.index(group),
                output.sums_ptr + unit * (4 * depth),
                schedule.order >> (8 * c),
                steps,
                depth,
            )
        n = n * cols
        if v.bias:  # loaded while the products run
            bias = gl.load(bias_ptr + c * width + n + o_n)
        minus = (schedule.negative >> (4 * c)) & 7
        acc = gl.zeros([64, cols], gl.float32, layout)
        for done in range(0, steps, chunk):
            size = gl.minimum(chunk, steps - done)
            plus = (v.terms - minus) * size
            minus_size = minus * size
            if v.sums:
                # A tile of the first component and columns sees all components of the left factor.
                if (c == first) & (n == 0):
                    acc, slot, phase = _accumulate_signs(
                        group, acc, minus_size, plus, ring, slot, phase, sums, v, True
                    )
                else:
                    acc, slot, phase = _accumulate_signs(
                        group, acc, minus_size, plus, ring, slot, phase, sums, v, False
                    )
            else:
                acc, slot, phase = _accumulate_signs(
                    group, acc, minus_size, plus, ring, slot, phase, ring, v, False
                )
        if v.of_weights:
            # [splits, 4, height, width]
            row = (m % tiles_m) * 128 + group * 64 + o_m
            page = gl.cast((m // tiles_m) * count + c, gl.int64) * height
            p_out = out_ptr + ((page + row) * width)[:, None] + (n + o_n)[None, :]
            gl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=(row < height)[:, None])
        else:
            col = (c - first) * width + n
            if v.bias:
                acc += bias.to(gl.float32)[None, :]
            tma.store_wait(0)
            out_smem.index(group).store(acc.to(out_desc.dtype))
            fence_async_shared()
            store(out_desc, [m * 128 + group * 64, col], out_smem.index(group))
    if not v.of_weights:
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["order", "negative", "depth", "height", "steps", "chunk", "tiles", "tiles_m"]
)
def hamilton_product_kernel(
    left_desc,  # output: x [M, 4·I]; input: g [M, 4·O]; weights: x; blocks of [64, 64]
    right0_desc,  # the weights [I, O], blocks of [64, cols], for "input" of [cols, 64]
    right1_desc,
    right2_desc,
    right3_desc,  # weights: only the first, g [M, 4·O], blocks of [64, cols]
    out_desc,  # output: y [M, 4·O]; input: dx; blocks of [64, cols]; weights: None
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
    v: gl.constexpr,  # HamiltonProduct
    PDL: gl.constexpr,
):
    """Multiply components of the left factor with those of the right one."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype: gl.constexpr = left_desc.dtype
    left_smem = gl.allocate_shared_memory(dtype, [2 * v.stages, 64, 64], left_desc.layout)
    right_smem = gl.allocate_shared_memory(
        dtype,
        [v.stages] + right0_desc.block_type.shape,  # noqa: RUF005
        right0_desc.layout,
    )
    out_smem = left_smem
    if not v.of_weights:
        out_smem = gl.allocate_shared_memory(dtype, [2, 64, v.cols], out_desc.layout)
    ones_smem = left_smem
    if v.sums:
        ones_smem = gl.allocate_shared_memory(dtype, [2, 8, 64], left_desc.layout)
    full_bars, empty_bars = ring_barriers(v.stages, 2)
    fence_async_shared()
    operands = Operands(left_desc, right0_desc, right1_desc, right2_desc, right3_desc)
    ring = Ring(left_smem, right_smem, full_bars, empty_bars)
    output = Output(out_desc, out_ptr, bias_ptr, sums_ptr, out_smem, ones_smem)
    schedule = Schedule(
        order, negative, first, count, depth, height, width, steps, chunk, tiles, tiles_m, tiles_n
    )
    gl.warp_specialize(
        [
            (_multiply, (0, ring, output, schedule, v)),
            (_multiply, (1, ring, output, schedule, v)),
            (_produce, (operands, ring, schedule, v)),
        ],
        [4, 1],
        [232, 40],
    )
