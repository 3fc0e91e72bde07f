"""Launching Triton kernels with little on the way, and what decides how they are launched."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Device(NamedTuple):
    """What launch configurations depend on."""

    index: int | None  # None: the interpreter, on the CPU
    multiprocessors: int
    shared: int  # bytes of shared memory a program can have
    major: int  # compute capability


@functools.cache
def device_of(index: int | None) -> Device:
    if index is None:
        return Device(None, 132, 232_448, 0)
    p = torch.cuda.get_device_properties(index)
    return Device(index, p.multi_processor_count, p.shared_memory_per_block_optin, p.major)


def block(n: int, least: int = 16) -> int:
    """The power of two that holds n, at least ``least``."""
    return max(least, 1 << (n - 1).bit_length())


class Descriptor:
    """Triton's TensorDescriptor without its checks, which cost more than the launch."""

    __slots__ = ("base", "block_shape", "layout", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: Tensor, block_shape: list[int], layout=None):
        self.base = base
        self.shape = base.shape
        self.strides = base.stride()
        self.block_shape = block_shape
        self.layout = layout

    def checked(self):
        args = (self.base, list(self.shape), list(self.strides), self.block_shape)
        if self.layout is None:
            return TensorDescriptor(*args)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(*args, self.layout)


@functools.cache
def _gluon_layout(box: tuple[int, ...], dtype: torch.dtype):
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(box), element)


def gluon_descriptor(t: Tensor, box: list[int]) -> Descriptor:
    """A descriptor of a half-precision tensor for a Gluon kernel."""
    return Descriptor(t, box, _gluon_layout(tuple(box), t.dtype))


_compiled: dict[tuple, tuple | None] = {}


def launch(kernel, grid: tuple, device: Device, *args, warps, stages=3, pdl=False, **constants):
    """``kernel[grid](*args, **constants)``.

    Triton's own launcher spends most of its time on finding the compiled kernel that fits the
    arguments. This one remembers it by what the compiler looks at: dtypes, alignment, integers.

    Args:
        args: the kernel's arguments in order; descriptors as :class:`Descriptor`.
        constants: its constexpr parameters in order, without ``PDL``, which is the last.
        pdl: programmatic dependent launch.
    """
    args = (*args, *constants.values(), pdl)
    specs = [
        (a.dtype, a.data_ptr() % 16 == 0)
        if isinstance(a, Tensor)
        else (a.base.dtype, *a.block_shape)
        if type(a) is Descriptor
        else a
        for a in args
    ]
    key = (id(kernel), device.index, warps, stages, *specs)
    hit = _compiled.get(key)
    if hit is not None:
        run, function, metadata = hit
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        run(*grid, *(1,) * (3 - len(grid)), stream, function, metadata, None, None, None, *args)
        return
    options = {"num_warps": warps, "num_stages": stages}
    if pdl:
        options["launch_pdl"] = True
    checked = [a.checked() if type(a) is Descriptor else a for a in args]
    compiled = kernel[grid](*checked, **options)
    if device.index is not None and all(
        hasattr(compiled, name) for name in ("run", "function", "packed_metadata")
    ):
        if len(_compiled) >= 4096:  # a program of ever new shapes
            _compiled.clear()
        _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata)


class Launch:
    """One kernel with everything but its tensors: for calls of the same sizes, again and again.

    Preparing arguments costs more than launching. What follows from a call's sizes is decided
    once and kept here; the compiled kernel is remembered by the tensors' dtypes and alignment.

    Args:
        kernel: with tensors first, then ``numbers``, then constexpr parameters, ``PDL`` the last.
        grid: up to three numbers.
        device: that all tensors will be on.
        numbers: integers.
        constants: constexpr parameters in order, without ``PDL``.
        pdl: programmatic dependent launch.
    """

    __slots__ = ("arguments", "compiled", "device", "grid", "kernel", "options")

    def __init__(self, kernel, grid, device, numbers, constants, *, warps, stages=3, pdl=False):
        self.kernel = kernel
        self.grid = (*grid, *(1,) * (3 - len(grid)))
        self.device = device.index
        self.arguments = (*numbers, *constants, pdl)
        self.options = {"num_warps": warps, "num_stages": stages}
        if pdl:
            self.options["launch_pdl"] = True
        self.compiled = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        key = tuple([t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
        hit = self.compiled.get(key)
        if hit is not None:
            run, function, metadata = hit
            stream = torch._C._cuda_getCurrentRawStream(self.device)
            run(
                *self.grid,
                stream,
                function,
                metadata,
                None,
                None,
                None,
                *tensors,
                *self.arguments,
            )
            return
        compiled = self.kernel[self.grid](*tensors, *self.arguments, **self.options)
        names = ("run", "function", "packed_metadata")
        if self.device is not None and all(hasattr(compiled, name) for name in names):
            self.compiled[key] = tuple(getattr(compiled, name) for name in names)
