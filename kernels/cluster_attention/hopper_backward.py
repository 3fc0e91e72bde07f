"""Hopper kernels of the backward of cluster attention, written in Gluon.

With g = dL/dy and the other names of :mod:`fastadapt.kernels.cluster_attention.triton_backward`:

(1)  hopper_project_backward   gz = g @ up                     [B·N, R], and the sum of g over rows
                               gh = gz @ T_bᵀ                  [B·N, R], and its sum over rows
(2)  hopper_expand_backward    dx = gh @ down + dq / N         [B·N, C]

All else of the backward is done by the Triton kernels, which compute (1) and (2), too, where
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
    warpgroup_mma,
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
    project_rows,
    refill_project,
    store_tile,
)

__all__ = [
    "ExpandVariant",
    "ProjectVariant",
    "hopper_expand_backward_kernel",
    "hopper_project_backward_kernel",
]


@gluon.jit
def _project_group(group: gl.constexpr, p, v: gl.constexpr):
    unit = gl.program_id(0) * v.groups + group
    out = project_rows(group, unit, p, v)
    if v.mix:
        dtype: gl.constexpr = p.out_desc.dtype
        BR: gl.constexpr = v.rank
        row = unit * 64
        t_layout: gl.constexpr = accumulator_layout(64)
        a = gl.convert_layout(out, gl.DotOperandLayout(0, t_layout, 2))
        o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, t_layout))
        o_n = gl.arange(0, 64, layout=gl.SliceLayout(0, t_layout))
        zeros = gl.zeros([64, 64], gl.float32, t_layout)
        mine_first = row // p.mix_tokens
        mine_last = (gl.minimum(row + 64, p.rows) - 1) // p.mix_tokens
        i = p.steps
        for n in gl.static_range(BR // 64):
            z = zeros
            for sample in range(p.first_sample, p.first_sample + p.samples):
                wait_for(p.full_bars, i, v)
                refill_project(i - 1, group, p, v)
                if (sample >= mine_first) & (sample <= mine_last):
                    t = p.w_ring.index(i % v.stages).permute((1, 0))
                    mixed = warpgroup_mma(a, t, zeros, use_acc=False, is_async=True)
                    mixed = warpgroup_mma_wait(0, [mixed])
                    # Rows of other samples met the wrong transform: keep those of this one.
                    z = gl.where(((row + o_m) // p.mix_tokens == sample)[:, None], mixed, z)
                mbarrier.arrive(p.empty_bars.index(i % v.stages), count=1)
                i += 1
            if v.mixed_sums:
                p_z = p.mixed_sums_ptr + gl.cast(unit, gl.int64) * BR + n * 64 + o_n
                gl.store(p_z, gl.sum(z, 0))
            buffer = p.x_ring.index(v.groups * ((n + 1) % v.stages) + group)
            store_tile(z.to(dtype), row, n * 64, p.mixed_desc, buffer, 0)
    tma.store_wait(0)


@gluon.jit
def hopper_project_backward_kernel(
    x_desc,  # [rows, C], blocks of [64, 64]: g
    w_desc,  # [C, R], blocks of [64, R]: up
    t_desc,  # [B·R, R], blocks of [64, R]; None without mix
    out_desc,  # [rows, R], blocks of [64, 64]: gz
    mixed_desc,  # the same: gh
    sums_ptr,  # [row blocks of 64, slots, C] fp32: column sums of g
    mixed_sums_ptr,  # [row blocks of 64, R] fp32: column sums of gh
    rows,
    width,
    tokens,  # rows of a sample of the sums
    slots,
    mix_tokens,  # rows of a sample of T_b
    v: gl.constexpr,  # ProjectVariant
    PDL: gl.constexpr,
):
    """Compute (1): the gradients of z and of h, and the sums for both biases."""
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
    p = ProjectArguments(
        x_desc=x_desc,
        w_desc=w_desc,
        t_desc=t_desc,
        out_desc=out_desc,
        mixed_desc=mixed_desc,
        bias_ptr=None,
        sums_ptr=sums_ptr,
        mixed_sums_ptr=mixed_sums_ptr,
        x_ring=x_ring,
        w_ring=w_ring,
        hot_smem=hot_smem,
        full_bars=full_bars,
        empty_bars=empty_bars,
        rows=rows,
        width=width,
        tokens=tokens,
        slots=slots,
        mix_tokens=mix_tokens,
        first_row=row,
        steps=steps,
        items=items,
        samples=samples,
        first_sample=first_sample,
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
def _expand_group(group: gl.constexpr, p, v: gl.constexpr):
    CHUNKS: gl.constexpr = v.rank // 64
    layout: gl.constexpr = accumulator_layout(64)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    row = (gl.program_id(0) * v.groups + group) * 64
    first = row // p.tokens
    load_rows(group, row, 64, p, v)
    z0 = p.h_smem.index(group * CHUNKS).load(a_layout)
    z1 = p.h_smem.index(group * CHUNKS + 1 % CHUNKS).load(a_layout)
    z2 = p.h_smem.index(group * CHUNKS + 2 % CHUNKS).load(a_layout)
    z3 = p.h_smem.index(group * CHUNKS + 3 % CHUNKS).load(a_layout)
    # The group's part of h is free now: it carries the output.
    i = 0
    expand_rows(group, i, z0, z1, z2, z3, row, first, p, v)


@gluon.jit
def hopper_expand_backward_kernel(
    h_desc,  # [rows, R], blocks of [64, 64]: gh
    w_desc,  # [R, C], blocks of [R, 64]: down
    y_desc,  # [rows, C], blocks of [64, 64]: dx
    bias_desc,  # [B, C], blocks of [16, 64]: dq / N
    rows,
    tokens,
    width,
    v: gl.constexpr,  # ExpandVariant
    PDL: gl.constexpr,
):
    """Compute (2): the gradient of x."""
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
    height = v.groups * 64
    row = gl.program_id(0) * height
    first_sample = row // tokens
    samples = (gl.minimum(row + height, rows) - 1) // tokens + 1 - first_sample
    p = ExpandArguments(
        h_desc=h_desc,
        t_desc=None,
        w_desc=w_desc,
        z_desc=None,
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
        t_items=0,
        items=(width + 63) // 64,
        first_sample=first_sample,
        samples=samples,
    )
    if v.groups == 1:
        _expand_group(0, p, v)
    elif v.groups == 2:
        gl.warp_specialize([(_expand_group, (0, p, v)), (_expand_group, (1, p, v))], [4], [240])
    else:
        gl.warp_specialize(
            [(_expand_group, (0, p, v)), (_expand_group, (1, p, v)), (_expand_group, (2, p, v))],
            [4, 4],
            [168, 168],
        )
