"""Hopper kernels of the forward of cluster attention, written in Gluon.

With h, T_b, z and y as in :mod:`fastadapt.kernels.cluster_attention.triton_forward`:

(1)  hopper_project     h = x @ downᵀ + down_bias           [B·N, R], and the sums of x
(2)  hopper_transform   z = h @ T_b                          [B·N, R]
                        y = z @ upᵀ + up_bias                [B·N, C]

Attention and mixing run between them, by the Triton kernels, which compute (1) and (2), too, where
:mod:`fastadapt.kernels.cluster_attention.block_sizes` does not choose these. How the groups of a
program share its tiles is described in :mod:`fastadapt.kernels.cluster_attention.hopper_helpers`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common.gluon_hopper import accumulator_layout, ring_barriers, wait_for
from .hopper_helpers import (
    ExpandArguments,
    ExpandVariant,
    ProjectArguments,
    ProjectVariant,
    expand_rows,
    load_rows,
    product,
    project_rows,
    refill_expand,
    store_tile,
)

__all__ = ["ExpandVariant", "ProjectVariant", "hopper_project_kernel", "hopper_transform_kernel"]


@gluon.jit
def _project_group(group: gl.constexpr, p, v: gl.constexpr):
    unit = gl.program_id(0) * v.groups + group
    project_rows(group, unit, p, v)
    tma.store_wait(0)


@gluon.jit
def hopper_project_kernel(
    x_desc,  # [rows, C], blocks of [64, 64]
    w_desc,  # [R, C], blocks of [R, 64]
    out_desc,  # [rows, R], blocks of [64, 64]: x @ weightᵀ + bias
    bias_ptr,  # [R]
    sums_ptr,  # [row blocks of 64, slots, C] fp32: column sums of x, of each sample's rows
    rows,
    width,
    tokens,  # rows of a sample of the sums
    slots,
    v: gl.constexpr,  # ProjectVariant
    PDL: gl.constexpr,
):
    """Compute (1): the down projection and the sums of x over the tokens of each sample."""
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
    p = ProjectArguments(
        x_desc=x_desc,
        w_desc=w_desc,
        t_desc=None,
        out_desc=out_desc,
        mixed_desc=None,
        bias_ptr=bias_ptr,
        sums_ptr=sums_ptr,
        mixed_sums_ptr=None,
        x_ring=x_ring,
        w_ring=w_ring,
        hot_smem=hot_smem,
        full_bars=full_bars,
        empty_bars=empty_bars,
        rows=rows,
        width=width,
        tokens=tokens,
        slots=slots,
        mix_tokens=1,
        first_row=row,
        steps=steps,
        items=steps,
        samples=1,
        first_sample=0,
    )
    if v.groups == 1:
        _project_group(0, p, v)
    elif v.groups == 2:
        gl.warp_specialize([(_project_group, (0, p, v)), (_project_group, (1, p, v))], [4], [240])
    else:
        gl.warp_specialize(
            [
                (_project_group, (0, p, v)),
                (_project_group, (1, p, v)),
                (_project_group, (2, p, v)),
            ],
            [4, 4],
            [168, 168],
        )


@gluon.jit
def _select(keep, acc, z, layout: gl.constexpr):
    """Return acc where ``keep``, z elsewhere; both layouts hold a value in the same register."""
    old = gl.convert_layout(z, layout)
    return gl.convert_layout(gl.where(keep, acc.to(z.dtype), old), z.type.layout)


@gluon.jit
def _transform_group(group: gl.constexpr, p, v: gl.constexpr):
    dtype: gl.constexpr = p.y_desc.dtype
    CHUNKS: gl.constexpr = v.rank // 64
    layout: gl.constexpr = accumulator_layout(64)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    zeros = gl.zeros([64, 64], gl.float32, layout)
    height = p.tokens if v.aligned else 64
    row = (gl.program_id(0) * v.groups + group) * height
    first = row // p.tokens
    last = (gl.minimum(row + height, p.rows) - 1) // p.tokens
    load_rows(group, row, height, p, v)
    h0 = p.h_smem.index(group * CHUNKS)
    h1 = p.h_smem.index(group * CHUNKS + 1 % CHUNKS)
    h2 = p.h_smem.index(group * CHUNKS + 2 % CHUNKS)
    h3 = p.h_smem.index(group * CHUNKS + 3 % CHUNKS)
    i = 0
    z0 = gl.zeros([64, 64], dtype, a_layout)
    z1 = z0
    z2 = z0
    z3 = z0
    for sample in range(p.first_sample, p.first_sample + p.samples):
        mine = (sample >= first) & (sample <= last)
        # Rows of other samples meet the wrong transform here: keep those of this one.
        keep = ((row + o_m) // p.tokens == sample)[:, None]
        for n in gl.static_range(CHUNKS):
            wait_for(p.full_bars, i, v)
            refill_expand(i - 1, group, p, v)
            if mine:
                acc = product(h0, h1, h2, h3, p.ring.index(i % v.stages), zeros, False, v)
                acc = warpgroup_mma_wait(0, [acc])
                if n == 0:
                    z0 = _select(keep, acc, z0, layout)
                if n == 1:
                    z1 = _select(keep, acc, z1, layout)
                if n == 2:
                    z2 = _select(keep, acc, z2, layout)
                if n == 3:
                    z3 = _select(keep, acc, z3, layout)
            mbarrier.arrive(p.empty_bars.index(i % v.stages), count=1)
            i += 1
    # The group's part of h is free now: it carries the output.
    if v.store_z:
        store_tile(gl.convert_layout(z0, layout), row, 0, p.z_desc, h0, 3)
        if CHUNKS > 1:
            store_tile(gl.convert_layout(z1, layout), row, 64, p.z_desc, h1, 3)
        if CHUNKS > 2:
            store_tile(gl.convert_layout(z2, layout), row, 128, p.z_desc, h2, 3)
            store_tile(gl.convert_layout(z3, layout), row, 192, p.z_desc, h3, 3)
    expand_rows(group, i, z0, z1, z2, z3, row, first, p, v)


@gluon.jit
def hopper_transform_kernel(
    h_desc,  # [rows, R], blocks of [64, 64]
    t_desc,  # [B·R, R], blocks of [R, 64]
    w_desc,  # [C, R], blocks of [64, R]
    z_desc,  # [rows, R], blocks of [64, 64], or aligned [B, N, R], [1, 64, 64]; or None
    y_desc,  # [rows, C], blocks of [64, 64], or aligned [B, N, C], [1, 64, 64]
    bias_desc,  # [1, C], blocks of [16, 64]; or None
    rows,
    tokens,
    width,
    v: gl.constexpr,  # ExpandVariant
    PDL: gl.constexpr,
):
    """Compute (2): the product with T_b and the up projection."""
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
    t_items = samples * (v.rank // 64)
    items = t_items + (width + 63) // 64
    p = ExpandArguments(
        h_desc=h_desc,
        t_desc=t_desc,
        w_desc=w_desc,
        z_desc=z_desc,
        y_desc=y_desc,
        bias_desc=bias_desc,
        h_smem=h_smem,
        ring=ring,
        bias_ring=bias_ring,
        h_full=h_full,
        full_bars=full_bars,
        empty_bars=empty_bars,
        rows=rows,
        tokens=tokens,
        width=width,
        first_row=row,
        t_items=t_items,
        items=items,
        first_sample=first_sample,
        samples=samples,
    )
    if v.groups == 1:
        _transform_group(0, p, v)
    elif v.groups == 2:
        gl.warp_specialize(
            [(_transform_group, (0, p, v)), (_transform_group, (1, p, v))], [4], [240]
        )
    else:
        gl.warp_specialize(
            [
                (_transform_group, (0, p, v)),
                (_transform_group, (1, p, v)),
                (_transform_group, (2, p, v)),
            ],
            [4, 4],
            [168, 168],
        )
