"""Prepared launches, with Triton's own launcher around a native function that only listens."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
import time
import types
import warnings
import weakref

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs
from triton.runtime import driver

from fastadapt.kernels.common import compile_ahead as ahead
from fastadapt.kernels.common import launcher as launch
from fastadapt.kernels.common.launcher import Box, Device, Launch

nvidia = pytest.importorskip("triton.backends.nvidia.driver")

GPU = Device(0, 132, 232_448, 9)
NUMBERS, CONSTANTS = (7, 16), (32, True)
TENSORS = ((0, Box((6, 8), (2, 8))), (0, Box((3, 16), (1, 16))), (1, None), None)
META = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [2, 8], "fp4_padded": False}


class Native:
    """In place of the native launch function: keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args):
        self.calls.append(args)


class Kernel:
    """In place of a jitted kernel: `compiles` to one whose launcher is Triton's around `native`."""

    ASTSource = object

    def __init__(self, signature, encoded=True, **changes):
        self.native = Native()
        self.compilations = 0
        self.device_caches = {0: "this GPU's"}
        self.warmups = []
        run = object.__new__(nvidia.CudaLauncher)
        meta = [META] * signature.count("tensordesc<fp16[2, 8]>") if encoded else []
        wrapped = nvidia.wrap_handle_tensordesc(self.native, dict(enumerate(signature)), meta)
        attributes = {
            "launch": wrapped,
            "num_ctas": 1,
            "global_scratch_size": 0,
            "global_scratch_align": 1,
            "profile_scratch_size": 0,
            "profile_scratch_align": 1,
            "launch_cooperative_grid": False,
            "launch_pdl": True,
            "gsan_enabled": False,
            "arg_annotations": [],
            "kernel_signature": b"",
        }
        for name, value in (attributes | changes).items():
            setattr(run, name, value)
        self.compiled = types.SimpleNamespace(
            run=run,
            function=4711,
            packed_metadata=(4, 1, 1024),
            launch_metadata=lambda grid, stream, *args: {"grid": grid, "stream": stream},
        )

    def __getitem__(self, grid):
        def compile_and_launch(*args, **options):
            self.compilations += 1
            return self.compiled

        return compile_and_launch

    def warmup(self, *args, grid, **options):
        self.warmups.append(args)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A driver that encodes descriptors as what it is given, one current stream, no GPU."""
    here = types.SimpleNamespace(stream=11)
    monkeypatch.setattr(launch, "_ready", {})
    monkeypatch.setattr(launch, "_begun", {})
    monkeypatch.setattr(ahead, "_last", None)
    monkeypatch.setattr(ahead, "_begin", lambda: lambda: None)
    monkeypatch.setattr(launch, "_check_device", lambda tensors, index: None)
    current = lambda index: here.stream  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current, raising=False)
    encode = lambda *args: ("encoded", *args[:4], *map(tuple, args[4:7]), *args[7:])  # noqa: E731
    utils = types.SimpleNamespace(fill_tma_descriptor=encode, fill_tma_descriptor_tiled=encode)
    active = types.SimpleNamespace(utils=utils, set_current_device=lambda index: None)
    monkeypatch.setattr(driver, "_active", active)
    return here


def described_kernel(**changes):
    descriptor = "tensordesc<fp16[2, 8]>"
    rest = ["i32"] * 2 + ["constexpr"] * 3
    return Kernel([descriptor, descriptor, "*fp16", "constexpr", *rest], **changes)


def described(kernel, numbers=NUMBERS, **options):
    return Launch(kernel, (5,), GPU, numbers, CONSTANTS, warps=4, tensors=TENSORS, **options)


def as_triton_would(kernel, stream, *tensors):
    """Return what the native function gets from Triton's launcher, with addresses for tensors."""
    before = len(kernel.native.calls)
    head = (5, 1, 1, stream, 4711, (4, 1, 1024), None, None, None)
    kernel.compiled.run(*head, *tensors, *NUMBERS, *CONSTANTS, True)
    (args,) = kernel.native.calls[before:]
    del kernel.native.calls[before:]
    return addresses(args)


def addresses(value):
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return tuple(map(addresses, value)) if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("encoded", [True, False])  # or as pointers, sizes and strides
def test_descriptors_reach_the_native_function_as_triton_passes_them(encoded, device):
    kernel = described_kernel(encoded=encoded)
    run = described(kernel)
    storage = torch.zeros(200, dtype=torch.float16)
    for stream, at in ((11, 0), (11, 8), (11, 0), (12, 0), (11, 0), (11, 8)):
        x, y = storage[at : at + 48], storage[100 + at : 110 + at]
        device.stream = stream
        run(x, y)
        if kernel.native.calls:  # the first call compiles, and Triton launches it
            expected = as_triton_would(
                kernel,
                stream,
                launch.Descriptor(x, TENSORS[0][1]),
                launch.Descriptor(x, TENSORS[1][1]),
                y,
                None,
            )
            assert addresses(kernel.native.calls.pop()) == expected
            assert str(x.data_ptr()) in str(expected) and str(y.data_ptr()) in str(expected)
    assert kernel.compilations == 1
    assert len(launch._ready) == 3  # (11, 8), (11, 0), (12, 0): the others were repeated


def test_pointers_reach_the_native_function_as_triton_passes_them():
    kernel = Kernel(["*fp16", "constexpr", "*fp16", "i32", "i32", *["constexpr"] * 3])
    run = Launch(kernel, (5,), GPU, NUMBERS, CONSTANTS, warps=4)
    storage = torch.zeros(64, dtype=torch.float16)
    # Of another alignment or dtype it is another kernel, at the same address, too.
    others = (storage, storage[1:], storage.view(torch.bfloat16), storage[8:])
    for _ in range(2):
        for y in others:
            run(storage, None, y)
    assert kernel.compilations == 3
    expected = [as_triton_would(kernel, 11, storage, None, y) for y in (others[3], *others)]
    assert [addresses(args) for args in kernel.native.calls] == expected


def test_nothing_keeps_the_tensors():
    kernel = described_kernel()
    run = described(kernel)
    x, y = (torch.zeros(n, dtype=torch.float16) for n in (48, 10))
    for _ in range(3):
        run(x, y)
    kernel.native.calls.clear()
    gone = [weakref.ref(x), weakref.ref(y)]
    del x, y
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_tensors_at_ever_new_addresses_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(launch, "MOST_READY", 64)
    run = described(described_kernel())
    storage = torch.zeros(2000, dtype=torch.float16)
    for at in range(0, 1600, 8):
        run(storage[at : at + 48], storage[at : at + 10])
    assert 0 < len(launch._ready) <= 64


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("chained", [True, False])
def test_launch_hooks_hear_of_every_launch(hook, chained, monkeypatch):
    kernel = described_kernel()
    run = described(kernel)
    x, y = (torch.zeros(n, dtype=torch.float16) for n in (48, 10))
    for _ in range(3):
        run(x, y)
    plain = [addresses(args) for args in kernel.native.calls]
    mine = lambda metadata: None  # noqa: E731
    if chained:
        mine = type(knobs.runtime.launch_enter_hook)()
        mine.add(lambda metadata: None)
    monkeypatch.setattr(knobs.runtime, hook, mine)
    run(x, y)
    hooked = addresses(kernel.native.calls[-1])
    assert mine in hooked and {"grid": (5, 1, 1), "stream": 11} in hooked
    monkeypatch.undo()
    assert plain[0] == plain[1] != hooked


@pytest.mark.parametrize(
    "changes",
    [
        {"global_scratch_size": 8},
        {"profile_scratch_size": 8},
        {"gsan_enabled": True},
        {"something_new": 1},
        {"launch": lambda *args: None},
    ],
)
def test_a_launcher_that_is_not_as_known_is_left_to_itself(changes):
    assert launch.recorder_of(described_kernel().compiled.run) is not None
    assert launch.recorder_of(described_kernel(**changes).compiled.run) is None
    if "something_new" in changes:
        kernel = described_kernel(**changes)
        run = described(kernel)
        x, y = (torch.zeros(n, dtype=torch.float16) for n in (48, 10))
        for _ in range(3):
            run(x, y)
        assert not launch._ready and len(kernel.native.calls) == 2


def test_a_tensor_of_another_size_or_device_is_refused(monkeypatch):
    run = described(described_kernel())
    x, y = (torch.zeros(n, dtype=torch.float16) for n in (48, 10))
    with pytest.raises(ValueError, match=r"\(47,\) does not fit \(6, 8\)"):
        run(x[:47], y)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is on cpu; expected cuda:0"):
        launch._check_device((x, None), 0)


# Compiling ahead of the launch.

DTYPES = (torch.float16, torch.float16)


def halves():
    return [torch.zeros(n, dtype=torch.float16) for n in (48, 10)]


def test_what_is_compiled_ahead_is_what_the_launch_asks_for():
    kernel = described_kernel()
    run = described(kernel, dtypes=DTYPES)
    run.ahead.join()
    ((a, b, pointer, nothing, *rest),) = kernel.warmups
    for descriptor, box in ((a, TENSORS[0][1]), (b, TENSORS[1][1])):
        assert descriptor.base.dtype == torch.float16
        assert tuple(descriptor.shape) == box.shape and tuple(descriptor.block_shape) == box.box
    assert pointer.dtype == torch.float16 and pointer.data_ptr() % 16 == 0
    assert nothing is None and tuple(rest) == (*NUMBERS, *CONSTANTS, True)
    run(*halves())
    assert kernel.compilations == 1  # Triton's own launch, which finds it


def test_of_an_operation_every_kernel_is_compiled_ahead():
    command = [sys.executable, "-m", "tools.compile_ahead"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"(\d+) ahead, (\d+) by launch", done.stdout)
    assert len(counts) == 14 and all(n != "0" and m == "0" for n, m in counts), done.stdout
    assert done.stdout.endswith("a child did not wait\ncompiled at the end\n"), done.stdout


def test_a_launch_waits_for_what_is_being_compiled():
    kernel, events = described_kernel(), []
    begun, go_on = threading.Event(), threading.Event()

    def warmup(*args, **options):
        begun.set()
        go_on.wait(100)
        events.append("compiled")

    kernel.warmup = warmup
    run = described(kernel, dtypes=DTYPES)
    begun.wait(100)
    threading.Timer(0.05, go_on.set).start()
    run(*halves())
    events.append("launched")
    assert events == ["compiled", "launched"]


def test_first_forms_are_written_one_by_one_and_the_rest_side_by_side(monkeypatch):
    class Source:
        def make_ir(self, name):
            time.sleep(0.02)
            written.append(name)

    class Writes(Kernel):
        ASTSource = Source

        def warmup(self, *args, **options):
            self.ASTSource().make_ir(self)
            go_on.wait(100)  # what follows is done side by side

    monkeypatch.setattr(ahead, "_slots", threading.Semaphore(4))
    written, go_on = [], threading.Barrier(4)
    kernels = [Writes(["*fp16"]) for _ in range(4)]
    for thread in [described(kernel, dtypes=DTYPES).ahead for kernel in kernels]:
        thread.join()
    assert written == kernels and not go_on.broken


def test_threads_leave_the_filters_of_warnings_alone():
    def filtered(*args, **options):
        with ahead._Warnings().catch_warnings():
            ahead._Warnings().simplefilter("error")
            seen.append(list(warnings.filters))

    seen, before = [], list(warnings.filters)
    kernel = described_kernel()
    kernel.warmup = filtered
    described(kernel, dtypes=DTYPES).ahead.join()
    filtered()
    assert seen[0] == before == warnings.filters and seen[1][0][0] == "error"


def test_what_does_not_compile_is_an_error_of_its_launch():
    class Broken(Kernel):
        def warmup(self, *args, **options):
            raise ValueError("unknown layout")

        def __getitem__(self, grid):
            return self.warmup

    run = described(Broken(["*fp16"]), dtypes=DTYPES)
    run.ahead.join()
    with pytest.raises(ValueError, match="unknown layout"):
        run(*halves())


def test_another_triton_compiles_at_the_launch(monkeypatch):
    monkeypatch.delattr(Kernel, "ASTSource")
    kernel = described_kernel()
    run = described(kernel, dtypes=DTYPES)
    run(*halves())
    assert run.ahead is None and kernel.compilations == 1 and not kernel.warmups


def test_sizes_that_triton_does_not_tell_apart_are_compiled_once():
    kernel = described_kernel()
    runs = [
        described(kernel, numbers, dtypes=DTYPES)
        for numbers in ((7, 16), (9, 32), (16, 16), (1, 16), (1, 48))
    ]
    for run in runs:
        run.ahead.join()
    assert sorted(args[4] for args in kernel.warmups) == [1, 7, 16]


def test_the_interpreter_compiles_nothing():
    run = Launch(None, (5,), Device(None, 1, 1, 0), (), (), warps=4, dtypes=DTYPES)
    assert run.ahead is None and not launch._begun


def test_a_thread_that_only_compiles_launches_nothing():
    kernel, other = described_kernel(), Kernel(["*fp16", "constexpr", "*fp16", "i32", "i32"])
    run, general = described(kernel), Launch(other, (5,), GPU, NUMBERS, CONSTANTS, warps=4)
    x, y = halves()
    with launch.compiling_only():
        run(x, y)
        run(x, y)
        for dtype in (torch.float16, torch.bfloat16):
            general(x, None, y.to(dtype))
    for thread in launch.begun():
        thread.join()
    assert not kernel.compilations and not kernel.native.calls and len(kernel.warmups) == 1
    assert [arguments[2].dtype for arguments in other.warmups] == [torch.float16, torch.bfloat16]
    run(x, y)
    assert kernel.compilations == 1
