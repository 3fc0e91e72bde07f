"""``python -m tools.compile_ahead``: do launches find compiled what was begun ahead of them?

Forward and backward on a GPU that is not there: a driver that says it is, Triton itself up to its
compiler, and one in its place that notes which kernel it is given in which thread. Prints a line
for every case: kernels compiled ahead of their launch, and by it. Then the process forks while one
compiles, and ends while others wait for their turn.
"""

import os
import threading
import time
import types

import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import cache, driver

from fastadapt.kernels.cluster_attention import config as cluster_attention_config
from fastadapt.kernels.cluster_attention import launches as cluster_attention_launch
from fastadapt.kernels.cluster_attention import plan as passes
from fastadapt.kernels.common import compile_ahead as ahead
from fastadapt.kernels.common import launcher as launch
from fastadapt.kernels.quaternion_linear import launches as quaternion_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ALL = (True,) * 7


def cluster_attention(b, n, c, r, k, dtype, params=None, needs=ALL):
    """With parameters beside the weights in ``params``; r = 0 is token mode."""
    params = params or dtype
    x, centers = torch.empty(b, n, c, dtype=dtype), torch.empty(c, k, dtype=params)
    args = [x, centers, torch.empty(k, r or n, r or n, dtype=params)] + [None] * 4
    if r:
        args[3:] = (
            torch.empty(r, c, dtype=dtype),
            torch.empty(r, dtype=params),
            torch.empty(c, r, dtype=dtype),
            torch.empty(c, dtype=params),
        )
    problem = passes.problem_of(args)
    y, saved = passes.forward(problem, args, save_z=needs[5], needs=needs)
    inputs = [t for i, t in enumerate(args) if i not in (4, 6)]
    passes.backward(problem, torch.empty_like(y), needs, inputs, list(saved))


def quaternion_linear(m, i, o, dtype, params=None, rotation=False, zero_half=False):
    params = params or dtype
    x = torch.empty(m, (2 if zero_half else 4) * i, dtype=dtype)
    weights = [torch.empty(i, o, dtype=params) for _ in range(4)]
    scale = torch.empty(i, o, dtype=params) if rotation else None
    form = {"rotation": rotation, "zero_half": zero_half}
    y = quaternion_launch.forward(x, weights, torch.empty(4 * o, dtype=params), scale, **form)
    asked = {"need_x": True, "need_w": True, "need_b": True, "bias_dtype": params}
    quaternion_launch.backward(torch.empty_like(y), x, weights, scale, **form, **asked)


CASES = (  # operation, compute capability, arguments
    (cluster_attention, 9, (64, 196, 64, 64, 20, BF16)),
    (cluster_attention, 9, (64, 196, 64, 64, 20, FP16, FP32)),
    (cluster_attention, 9, (64, 196, 64, 64, 20, BF16, BF16, (True, False, *ALL[2:]))),
    (cluster_attention, 9, (64, 196, 64, 64, 20, BF16, BF16, (False, *ALL[1:]))),
    (cluster_attention, 9, (1, 196, 64, 64, 20, BF16)),
    (cluster_attention, 9, (64, 197, 63, 60, 20, BF16)),
    (cluster_attention, 9, (64, 196, 64, 64, 20, FP32)),
    (cluster_attention, 9, (64, 196, 64, 0, 20, BF16, BF16, (*ALL[:3], *(False,) * 4))),
    (cluster_attention, 8, (64, 196, 64, 64, 20, FP16)),
    (quaternion_linear, 9, (64, 64, 48, BF16)),
    (quaternion_linear, 9, (64, 64, 48, FP16, FP32, True)),
    (quaternion_linear, 9, (4096, 128, 64, BF16)),
    (quaternion_linear, 9, (4096, 128, 64, FP16, FP32, False, True)),
    (quaternion_linear, 8, (1024, 64, 64, FP32, FP32, False, True)),
)


class Driver:
    """Of one GPU; each case has a GPU of its own, for Triton to know of nothing compiled."""

    capability = 9
    device = 0

    def get_current_target(self):
        return GPUTarget("cuda", 10 * self.capability, 32)

    def get_current_device(self):
        return self.device

    def set_current_device(self, device):
        assert device == self.device

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, src, metadata):
        compiled["launchers"].append(src.name)


compiled = {"ahead": [], "by the launch": [], "launchers": []}


def compile(src, target=None, options=None, **others):
    ahead = threading.current_thread() is not threading.main_thread()
    compiled["ahead" if ahead else "by the launch"].append(src.name)
    src.make_ir()
    ignore = lambda *args: None  # noqa: E731
    return types.SimpleNamespace(
        src=src, metadata=0, function=0, packed_metadata=0, launch_metadata=ignore, run=ignore
    )


def main():
    driver.set_active(Driver())
    triton.compiler.compile = compile
    triton.compiler.ASTSource.make_ir = GluonASTSource.make_ir = lambda self: None
    cache.triton_key = lambda: "of all of Triton"  # takes a second
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    launch._check_device = lambda tensors, index: None
    cluster_attention_launch.new = lambda shape, dtype, device: (
        lambda: torch.empty(shape, dtype=dtype)
    )
    cluster_attention_config.tuning.chosen = lambda *args: {}
    for index, (operation, capability, args) in enumerate(CASES):
        Driver.capability, Driver.device = capability, index
        device = launch.Device(index, 132, 232_448 if capability == 9 else 166_912, capability)
        for module in (cluster_attention_config, quaternion_launch):
            module.device_of = lambda index, device=device: device
        for kernels in compiled.values():
            kernels.clear()
        operation(*args)
        assert sorted(compiled["launchers"]) == sorted(compiled["ahead"])
        counts = f"{len(compiled['ahead'])} ahead, {len(compiled['by the launch'])} by launch"
        print(f"{operation.__name__}{args}: {counts}")
    leave()


class Slow:
    """In place of a kernel."""

    ASTSource = object
    begun = threading.Event()

    def __init__(self, device):
        self.device_caches = {device: None}

    def warmup(self, *args, **options):
        self.begun.set()
        time.sleep(0.5)
        print("compiled at the end")


def leave():
    """Forks and ends while one of three kernels compiles."""
    ahead._places = threading.Semaphore(1)
    device = Driver.device
    first, *_ = [ahead.Ahead(Slow(device), device, [], {}) for _ in range(3)]
    Slow.begun.wait()
    child = os.fork()
    if not child:
        first.join()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print("a child did not wait")


if __name__ == "__main__":
    main()
