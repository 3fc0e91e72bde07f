"""Prepared launches, with Triton's own launcher around a native function that only listens."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs
from triton.runtime import driver

from fastadapt.kernels import launch
from fastadapt.kernels.launch import Box, Device, Launch

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

    def __init__(self, signature, encoded=True, **changes):
        self.native = Native()
        self.compilations = 0
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


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A driver that encodes descriptors as what it is given, one current stream, no GPU."""
    here = types.SimpleNamespace(stream=11)
    monkeypatch.setattr(launch, "_ready", {})
    monkeypatch.setattr(launch, "_check_device", lambda tensors, index: None)
    current = lambda index: here.stream  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current, raising=False)
    encode = lambda *args: ("encoded", *args[:4], *map(tuple, args[4:7]), *args[7:])  # noqa: E731
    utils = types.SimpleNamespace(fill_tma_descriptor=encode, fill_tma_descriptor_tiled=encode)
    monkeypatch.setattr(driver, "_active", types.SimpleNamespace(utils=utils))
    return here


def described_kernel(**changes):
    descriptor = "tensordesc<fp16[2, 8]>"
    rest = ["i32"] * 2 + ["constexpr"] * 3
    return Kernel([descriptor, descriptor, "*fp16", "constexpr", *rest], **changes)


def described(kernel):
    return Launch(kernel, (5,), GPU, NUMBERS, CONSTANTS, warps=4, tensors=TENSORS)


def as_triton_would(kernel, stream, *tensors):
    """What the native function gets from Triton's launcher, with addresses for tensors."""
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
    with pytest.raises(ValueError, match=r"\(47,\) is no \(6, 8\)"):
        run(x[:47], y)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is on cpu; expected cuda:0"):
        launch._check_device((x, None), 0)
