"""Gluon for Hopper as the kernels of all operations use it, under the names of every Triton."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Named anew after Triton 3.6.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
view = (
    getattr(gl.shared_memory_descriptor, "reinterpret", None)
    or gl.shared_memory_descriptor._reinterpret
)


@gluon.constexpr_function
def accumulator_layout(cols):
    """A [64, cols] accumulator of one group of four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])


@gluon.jit
def ring_barriers(STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """For each slot of a ring: it is full; every group is through with it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    return full, empty


@gluon.jit
def wait_for(bars, i, v: gl.constexpr):
    """Until the barrier of item i's slot was passed for item i, in a ring of ``v.stages`` slots."""
    mbarrier.wait(bars.index(i % v.stages), (i // v.stages) & 1)


@gluon.jit
def halves(t):
    """The left and the right half of t's columns [64, …]: no data moves, they lie in registers."""
    COLS: gl.constexpr = t.type.shape[1]
    return t.reshape([64, 2, COLS // 2]).permute((0, 2, 1)).split()
