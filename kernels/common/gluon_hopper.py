"""Gluon for Hopper as all operations use it: names of every Triton, and the ring buffer.

A ring buffer has ``v.stages`` slots; item i is in slot i mod stages. A producer waits for a slot's
empty barrier before it refills it, consumers wait for its full barrier before they read it.
"""

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
    """Return the layout of a [64, cols] accumulator of one group of four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])


@gluon.jit
def ring_barriers(STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """Make the full and the empty barrier of each slot; every group arrives at the empty one."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    return full, empty


@gluon.jit
def wait_for(bars, i, v: gl.constexpr):
    """Wait until the barrier of item i's slot has completed its phase for item i."""
    mbarrier.wait(bars.index(i % v.stages), (i // v.stages) & 1)


@gluon.jit
def halves(t):
    """Split the columns of t [64, …] in two halves, in registers: no data moves."""
    COLS: gl.constexpr = t.type.shape[1]
    return t.reshape([64, 2, COLS // 2]).permute((0, 2, 1)).split()
