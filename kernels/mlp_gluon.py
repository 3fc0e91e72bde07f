"""A linear layer for Hopper whose epilogue applies GELU, its derivative, or adds a residual.

Warps specialise as in `cluster_attention_gluon`: one copies, two groups of four multiply 64 rows
each of a 128 x 256 tile.
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

_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.constexpr_function
def _layout(cols):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])


@gluon.jit
def _normal_tail(x):
    """P(Z > |x|) for a standard normal Z, and exp(-x²/2).

    Abramowitz and Stegun 7.1.26, 1.5e-7 absolute: below what the half types can tell.
    """
    u = gl.maximum(x, -x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * u)
    p = 1.061405429 * t - 1.453152027
    p = p * t + 1.421413741
    p = p * t - 0.284496736
    p = p * t + 0.254829592
    e = gl.exp(-u * u)
    return 0.5 * p * t * e, e


@gluon.jit
def _gelu(x):
    tail, _ = _normal_tail(x)
    return gl.where(x > 0, x - x * tail, x * tail)


@gluon.jit
def _gelu_derivative(x):
    tail, e = _normal_tail(x)
    return gl.where(x > 0, 1.0 - tail, tail) + x * e * 0.3989422804014327


@gluon.jit
def _copy(
    x_desc,
    w_desc,
    x_ring,
    w_ring,
    full_bars,
    empty_bars,
    depth,
    tiles_n,
    tiles,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
):
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = tile // tiles_n * 128
        col = tile % tiles_n * 256
        for k in range(0, depth, 64):
            full = full_bars.index(slot)
            mbarrier.wait(empty_bars.index(slot), phase)
            mbarrier.expect(full, (128 + 256) * 64 * 2)
            _load(x_desc, [row, k], full, x_ring.index(2 * slot))
            _load(x_desc, [row + 64, k], full, x_ring.index(2 * slot + 1))
            if TRANSPOSED:
                _load(w_desc, [k, col], full, w_ring.index(slot))
            else:
                _load(w_desc, [col, k], full, w_ring.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _multiply(
    group: gl.constexpr,
    out_desc,
    extra_desc,
    before_desc,
    bias_ptr,
    sums_ptr,
    x_ring,
    w_ring,
    out_smem,
    full_bars,
    empty_bars,
    extra_bars,
    depth,
    cols,
    tiles_n,
    tiles,
    TRANSPOSED: gl.constexpr,
    BIAS: gl.constexpr,
    EXTRA: gl.constexpr,
    GELU: gl.constexpr,
    SAVE: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = out_desc.dtype
    layout: gl.constexpr = _layout(256)
    o_n = gl.arange(0, 256, layout=gl.SliceLayout(0, layout))
    smem = out_smem.index(group)
    slot = 0
    phase = 0
    extra_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = tile // tiles_n * 128 + group * 64
        col = tile % tiles_n * 256
        if EXTRA != "":
            # On its way while the product is made, in the place where the output will be.
            tma.store_wait(0)
            bar = extra_bars.index(group)
            mbarrier.expect(bar, 64 * 256 * 2)
            _load(extra_desc, [row, col], bar, smem)
        acc = gl.zeros([64, 256], gl.float32, layout)
        for _ in range(0, depth, 64):
            mbarrier.wait(full_bars.index(slot), phase)
            w = w_ring.index(slot)
            if not TRANSPOSED:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x_ring.index(2 * slot + group), w, acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty_bars.index(slot), count=1)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        if BIAS:
            bias = gl.load(bias_ptr + col + o_n, mask=col + o_n < cols, other=0.0)
            acc += bias.to(gl.float32)[None, :]
        if EXTRA != "":
            mbarrier.wait(extra_bars.index(group), extra_phase)
            extra_phase ^= 1
            extra = smem.load(layout).to(gl.float32)
            if EXTRA == "residual":
                acc += extra
            else:
                acc *= _gelu_derivative(extra)
                unit = gl.cast(tile // tiles_n * 2 + group, gl.int64)
                p_sums = sums_ptr + unit * cols + col + o_n
                gl.store(p_sums, gl.sum(acc, 0), mask=col + o_n < cols)
        if SAVE:
            tma.store_wait(0)
            smem.store(acc.to(dtype))
            fence_async_shared()
            _store(before_desc, [row, col], smem)
        if GELU:
            acc = _gelu(acc)
        tma.store_wait(0)
        smem.store(acc.to(dtype))
        fence_async_shared()
        _store(out_desc, [row, col], smem)
    tma.store_wait(0)


@gluon.jit
def linear_kernel(
    x_desc,  # [M, K], blocks of [64, 64]
    w_desc,  # [N, K], blocks of [256, 64], or transposed [K, N], blocks of [64, 256]
    out_desc,  # [M, N], blocks of [64, 256]
    extra_desc,  # the residual, or the values before GELU
    before_desc,  # where SAVE puts the values before GELU
    bias_ptr,  # [N]
    sums_ptr,  # [2 * row tiles, N] fp32: column sums of the output, with EXTRA "before"
    depth,
    cols,
    tiles_n,
    tiles,
    TRANSPOSED: gl.constexpr,
    BIAS: gl.constexpr,
    EXTRA: gl.constexpr,  # "", "residual": add it, "before": multiply by GELU's derivative there
    GELU: gl.constexpr,
    SAVE: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, 64], x_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    out_smem = gl.allocate_shared_memory(dtype, [2, 64, 256], out_desc.layout)
    full_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    extra_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full_bars.index(i), count=1)
        mbarrier.init(empty_bars.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(extra_bars.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    out_desc,
                    extra_desc,
                    before_desc,
                    bias_ptr,
                    sums_ptr,
                    x_ring,
                    w_ring,
                    out_smem,
                    full_bars,
                    empty_bars,
                    extra_bars,
                    depth,
                    cols,
                    tiles_n,
                    tiles,
                    TRANSPOSED,
                    BIAS,
                    EXTRA,
                    GELU,
                    SAVE,
                    STAGES,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    out_desc,
                    extra_desc,
                    before_desc,
                    bias_ptr,
                    sums_ptr,
                    x_ring,
                    w_ring,
                    out_smem,
                    full_bars,
                    empty_bars,
                    extra_bars,
                    depth,
                    cols,
                    tiles_n,
                    tiles,
                    TRANSPOSED,
                    BIAS,
                    EXTRA,
                    GELU,
                    SAVE,
                    STAGES,
                ),
            ),
            (
                _copy,
                (
                    x_desc,
                    w_desc,
                    x_ring,
                    w_ring,
                    full_bars,
                    empty_bars,
                    depth,
                    tiles_n,
                    tiles,
                    TRANSPOSED,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )
