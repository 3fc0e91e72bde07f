"""Show what racecheck reports of ``warp_specialize`` itself, without a kernel of this package.

    compute-sanitizer --tool racecheck python tools/handover.py

One group of warps stores 128 numbers and arrives at a barrier, the other waits there and reads
them. The hazards that racecheck reports (Triton 3.6, CUDA 13) are those of ``tools/sanitize.py``:
a write at ``warp_specialize`` and a read at the kernel's first line, of the byte that tells a group
which part to run. None is of the numbers.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def _group(which: gl.constexpr, out, numbers, bar):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, 128, layout=layout)
    if which == 0:
        numbers.store(i)
        mbarrier.arrive(bar, count=1)
    else:
        mbarrier.wait(bar, 0)
        gl.store(out + i, numbers.load(layout))


@gluon.jit
def handover_kernel(out):
    """Hand 128 numbers from one group of warps to another."""
    numbers = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    gl.warp_specialize(
        [(_group, (0, out, numbers, bar)), (_group, (1, out, numbers, bar))], [4], [240]
    )


if __name__ == "__main__":
    out = torch.zeros(128, dtype=torch.int32, device="cuda")
    handover_kernel[(1,)](out, num_warps=4)
    assert out.tolist() == list(range(128))
