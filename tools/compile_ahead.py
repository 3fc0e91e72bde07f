"""Check that launches find compiled what was begun ahead of them, without a GPU.

    python -m tools.compile_ahead

A driver claims a GPU that is not there, Triton is itself up to its compiler, and a compiler in its
place notes which kernel it is given in which thread. Prints a line for every case: kernels compiled
ahead of their launch, and by it. Then the process forks while one compiles, and ends while others
wait for their turn.
"""

import contextlib
import os
import threading
import time
import types

import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import cache, driver

from fastadapt.kernels.common import compile_ahead, dispatch, launcher, tuning
from tests.helpers.compiled_kernels import (
    BF16,
    FP16,
    FP32,
    GPUS,
    cluster_attention,
    quaternion_linear,
    replaced,
)


def without(*numbers: int) -> list[bool]:
    """Return which of seven arguments need gradients: all but these."""
    return [i not in numbers for i in range(7)]


CASES = (  # compute capability, operation, arguments, options
    (90, cluster_attention, (64, 196, 64, 64, 20, BF16), {}),
    (90, cluster_attention, (64, 196, 64, 64, 20, FP16, FP32), {}),
    (90, cluster_attention, (64, 196, 64, 64, 20, BF16), {"needs": without(1)}),
    (90, cluster_attention, (64, 196, 64, 64, 20, BF16), {"needs": without(0)}),
    (90, cluster_attention, (1, 196, 64, 64, 20, BF16), {}),
    (90, cluster_attention, (64, 197, 63, 60, 20, BF16), {}),
    (90, cluster_attention, (64, 196, 64, 64, 20, FP32), {}),
    (90, cluster_attention, (64, 196, 64, 0, 20, BF16), {}),
    (80, cluster_attention, (64, 196, 64, 64, 20, FP16), {}),
    (90, quaternion_linear, (64, 64, 48, BF16), {}),
    (90, quaternion_linear, (64, 64, 48, FP16, FP32), {"rotation": True, "scale": True}),
    (90, quaternion_linear, (4096, 128, 64, BF16), {}),
    (90, quaternion_linear, (4096, 128, 64, FP16, FP32), {"zero_half": True}),
    (80, quaternion_linear, (1024, 64, 64, FP32), {"zero_half": True}),
)


class Driver:
    """Claim one GPU; each case has a GPU of its own, for Triton to know of nothing compiled."""

    capability = 90
    device = 0

    def get_current_target(self):
        """Return the GPU that kernels are compiled for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        """Return its index."""
        return self.device

    def set_current_device(self, device):
        """Accept the only GPU."""
        assert device == self.device

    def get_current_stream(self, device):
        """Return the default stream."""
        return 0

    def launcher_cls(self, src, metadata):
        """Record that a launcher was made."""
        compiled["launchers"].append(src.name)


compiled = {"ahead": [], "by the launch": [], "launchers": []}


def compile(src, target=None, options=None, **others):
    """Record who compiles, and return a kernel that does nothing."""
    ahead = threading.current_thread() is not threading.main_thread()
    compiled["ahead" if ahead else "by the launch"].append(src.name)
    src.make_ir()
    ignore = lambda *args: None  # noqa: E731
    return types.SimpleNamespace(
        src=src, metadata=0, function=0, packed_metadata=0, launch_metadata=ignore, run=ignore
    )


def main():
    """Run all cases, then fork and leave while kernels compile."""
    driver.set_active(Driver())
    triton.compiler.compile = compile
    triton.compiler.ASTSource.make_ir = GluonASTSource.make_ir = lambda self: None
    cache.triton_key = lambda: "of all of Triton"  # takes a second
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    launcher._check_device = lambda tensors, index: None
    tuning.chosen = lambda *args: {}
    for index, (capability, operation, args, options) in enumerate(CASES):
        Driver.capability, Driver.device = capability, index
        device = launcher.Device(index, *GPUS[capability], capability // 10)
        for kernels in compiled.values():
            kernels.clear()
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(launcher.device_of, lambda index, device=device: device))
            stack.enter_context(replaced(launcher.new, on_the_cpu))
            stack.enter_context(replaced(dispatch.why_not_device, lambda x: None))
            operation(*args, **options)
        assert sorted(compiled["launchers"]) == sorted(compiled["ahead"])
        counts = f"{len(compiled['ahead'])} ahead, {len(compiled['by the launch'])} by launch"
        print(f"sm_{capability} {operation.__name__}{args} {options or ''}: {counts}")
    leave()


def on_the_cpu(shape, dtype, device):
    """Make tensors where there is memory."""
    return lambda: torch.empty(shape, dtype=dtype)


class Slow:
    """Stand in for a kernel."""

    ASTSource = object
    begun = threading.Event()

    def __init__(self, device):
        self.device_caches = {device: None}

    def warmup(self, *args, **options):
        """Take half a second."""
        self.begun.set()
        time.sleep(0.5)
        print("compiled at the end")


def leave():
    """Fork and end while one of three kernels compiles."""
    compile_ahead._slots = threading.Semaphore(1)
    device = Driver.device
    first, *_ = [compile_ahead.Ahead(Slow(device), device, [], {}) for _ in range(3)]
    Slow.begun.wait()
    child = os.fork()
    if not child:
        first.join()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print("a child did not wait")


if __name__ == "__main__":
    main()
