"""Launch Triton kernels with little overhead on the host.

In each call Triton looks at every argument, finds the compiled kernel that fits them and encodes
descriptors: that takes longer than most kernels run. Here everything that follows from a problem's
size is decided once (:class:`Launch`), and a call with tensors at known addresses is a look-up in a
dictionary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import operator
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from .compile_ahead import Ahead

try:  # what torch.compile's own code allocates with: half the price of torch.empty
    from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
except ImportError:
    _empty_strided_cuda = None


class Device(NamedTuple):
    """What block sizes and the choice of kernels depend on.

    :func:`fastadapt.kernels.common.dispatch.why_not_gpu` says which GPUs get any kernels.
    """

    index: int | None  # type: ignore[assignment]  # None: the interpreter, on the CPU
    multiprocessors: int
    shared: int  # bytes of shared memory a program can have
    major: int  # compute capability; 0 in the interpreter

    @property
    def has_warp_group_products(self) -> bool:
        """Whether the Hopper kernels run: their instructions are those of 9.x alone."""
        return self.major == 9

    @property
    def has_tall_products(self) -> bool:
        """Whether four warps multiply 64 rows together: wgmma of 9.x, tcgen05 of 10.x."""
        return self.major in (9, 10)

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel may be launched while the one before runs."""
        return self.major >= 9


@functools.cache
def device_of(index: int | None) -> Device:
    """Return the GPU of a number, or what stands for one in the interpreter."""
    if index is None:
        return Device(None, 132, 232_448, 0)
    p: Any = torch.cuda.get_device_properties(index)
    return Device(index, p.multi_processor_count, p.shared_memory_per_block_optin, p.major)


def block(n: int, least: int = 16) -> int:
    """Return the power of two that holds n, at least ``least``."""
    return max(least, 1 << (n - 1).bit_length())


def new(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> Callable[[], Tensor]:
    """Return a function that makes contiguous tensors, uninitialised, on the current GPU.

    In the interpreter they are on the CPU.
    """
    if device.index is None:
        return lambda: torch.empty(shape, dtype=dtype)
    strides = _contiguous_strides(shape)
    if _empty_strided_cuda is None:
        return lambda: torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
    return functools.partial(_empty_strided_cuda, shape, strides, dtype)


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class Box:
    """How a kernel's bulk copies see a tensor.

    Args:
        shape: the tensor's shape there, which may be another of as many elements.
        box: the shape that one bulk copy moves.
        strides: ``None`` if contiguous.
        layout: of shared memory, for Gluon kernels.
    """

    __slots__ = ("box", "count", "layout", "shape", "strides")

    def __init__(self, shape, box, strides=None, layout=None):
        self.shape = tuple(shape)
        self.box = tuple(box)
        self.strides = strides or _contiguous_strides(self.shape)
        self.layout = layout
        self.count = math.prod(self.shape)


def gluon_box(shape, box, dtype: torch.dtype, strides=None) -> Box:
    """Return a box of a half-precision tensor for a Gluon kernel."""
    return Box(shape, box, strides, _gluon_layout(tuple(box), dtype))


@functools.cache
def _gluon_layout(box: tuple[int, ...], dtype: torch.dtype):
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(box), element)


class Descriptor:
    """Stand for Triton's TensorDescriptor, without its checks, which cost more than the launch."""

    __slots__ = ("base", "block_shape", "layout", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: Tensor, box: Box):
        if base.numel() != box.count:
            raise ValueError(f"a tensor of shape {tuple(base.shape)} does not fit {box.shape}")
        self.base = base
        self.shape = box.shape
        self.strides = box.strides
        self.block_shape = box.box
        self.layout = box.layout

    def checked(self):
        """Return Triton's own descriptor."""
        args = (self.base, list(self.shape), list(self.strides), list(self.block_shape))
        if self.layout is None:
            return TensorDescriptor(*args)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(*args, self.layout)


class StandIn:
    """Stand for an aligned tensor, with all that Triton reads of one to compile."""

    __slots__ = ("count", "dtype")

    def __init__(self, dtype: torch.dtype, count: int | None):
        self.dtype = dtype
        self.count = count

    def data_ptr(self) -> int:
        """Return an address that is aligned."""
        return 0

    def numel(self) -> int | None:
        """Return the number of elements, where it is known."""
        return self.count


class Launch:
    """Launch one kernel for calls of the same sizes; everything but the tensors is prepared.

    A call takes one of three paths:

    1. The first call with some dtypes and alignments goes through Triton, which compiles.
    2. The first call with some tensors has Triton's launcher build the arguments of the native
       launch function and keeps them: addresses, encoded descriptors, numbers, but no tensor.
    3. Every further call with tensors at the same addresses, on the same stream, passes them again.

    Where Triton is not as :func:`recorder_of` knows it, and while a launch hook is set (a
    profiler's), Triton's launcher does all of it.

    Args:
        kernel: its parameters are tensors first, then ``numbers``, then constexpr parameters, of
            which ``PDL`` is the last.
        grid: up to three numbers.
        device: that all tensors will be on.
        numbers: integers.
        constants: constexpr parameters in order, without ``PDL``.
        tensors: for each of the kernel's tensors, which of a call's tensors it is, by number, and
            its box if it goes as a descriptor; ``None`` for one that there never is. Those with a
            box are contiguous (or have its strides) and aligned to 16 bytes. All have the same
            dtypes in every call: they are not looked at. Without ``tensors`` a call brings one for
            each of the kernel's, of any dtype, or ``None``, and they go as pointers. At least
            two.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        dtypes: of a call's tensors, where they are known before it: the kernel starts to compile
            at once, in a thread, for tensors that are aligned to 16 bytes. ``None`` for a tensor
            that is not there.
    """

    __slots__ = (
        "ahead",
        "arguments",
        "compiled",
        "device",
        "grid",
        "kernel",
        "numbers",
        "options",
        "tensors",
        "used",
    )

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        device: Device,
        numbers: tuple,
        constants: tuple,
        *,
        warps: int,
        stages: int = 3,
        tensors: tuple[tuple[int, Box | None] | None, ...] | None = None,
        dtypes: tuple[torch.dtype | None, ...] | None = None,
    ):
        self.kernel = kernel
        self.grid = (*grid, *(1,) * (3 - len(grid)))
        self.device = device.index
        self.numbers = numbers
        pdl = device.has_dependent_launch
        self.arguments = (*numbers, *constants, pdl)
        # Products and sums become one instruction; Triton 3.10 does not do so by default.
        self.options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        if pdl:
            self.options["launch_pdl"] = True
        self.tensors = tensors
        if tensors is not None:
            self.used = operator.itemgetter(*sorted({t[0] for t in tensors if t is not None}))
        self.compiled: dict[tuple, tuple] = {}
        self.ahead: Ahead | None = None
        if dtypes is not None and self.device is not None:
            self.ahead = self._compile_ahead(self.device, dtypes)

    def _compile_ahead(self, device: int, dtypes: tuple) -> Ahead | None:
        """Start to compile, unless the same was begun for another size."""
        rest = self.arguments[len(self.numbers) :]
        kinds = [(n == 1, n % 16 == 0) for n in self.numbers]  # what Triton compiles apart
        variant = (id(self.kernel), device, rest, *self.options.values(), dtypes, *kinds)
        if variant not in _begun:
            counts = {i: box.count for i, box in filter(None, self.tensors or ()) if box}
            tensors = [d and StandIn(d, counts.get(i)) for i, d in enumerate(dtypes)]
            with contextlib.suppress(Exception):  # Triton is not as known, or the launch will tell
                arguments = self._triton_arguments(tensors)
                _begun[variant] = Ahead(self.kernel, device, arguments, self.options)
        return _begun.get(variant)

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch the kernel with a call's tensors."""
        if self.device is None:
            self._by_triton(tensors)
            return
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if self.tensors is not None:
            key = (self, stream, *map(_address, self.used(tensors)))
        else:
            key = (self, stream, *[t if t is None else (t.dtype, t.data_ptr()) for t in tensors])
        ready = _ready.get(key)
        if ready is None or _hooked():
            self._prepare(key, stream, tensors)
            return
        native, arguments = ready
        native(*arguments)

    def _by_triton(self, tensors):
        if self.ahead is not None:
            self.ahead.join()
        return self.kernel[self.grid](*self._triton_arguments(tensors), **self.options)

    def _triton_arguments(self, tensors) -> list:
        tensors = self._kernel_tensors(tensors)
        return [*(t.checked() if type(t) is Descriptor else t for t in tensors), *self.arguments]

    def _kernel_tensors(self, tensors) -> tuple:
        if self.tensors is None:
            return tensors

        def argument(number: int, box: Box | None):
            return tensors[number] if box is None else Descriptor(tensors[number], box)

        return tuple([which and argument(*which) for which in self.tensors])

    def _prepare(self, key: tuple, stream: int, tensors) -> None:
        """Launch, and keep what the next launch of the same tensors needs."""
        if getattr(_this_thread, "compiles_only", False):
            if self.device is not None and (self.ahead is None or self.tensors is None):
                dtypes = tuple([t if t is None else t.dtype for t in tensors])
                self.ahead = self._compile_ahead(self.device, dtypes)
            return
        given = tensors if self.tensors is None else self.used(tensors)
        _check_device(given, self.device)
        kind = tuple([t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in given])
        compiled, recorder = self.compiled.get(kind, (None, None))
        if compiled is None:
            compiled = self._by_triton(tensors)
            names = ("run", "function", "packed_metadata", "launch_metadata")
            if all(hasattr(compiled, name) for name in names):
                self.compiled[kind] = (compiled, recorder_of(compiled.run))
            return
        arguments = (*self._kernel_tensors(tensors), *self.arguments)
        launch = (*self.grid, stream, compiled.function, compiled.packed_metadata)
        if recorder is None or _hooked():  # as Triton goes on once it has found the kernel
            metadata = compiled.launch_metadata(self.grid, stream, *arguments)
            hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
            compiled.run(*launch, metadata, *hooks, *arguments)
            return
        if len(_ready) >= MOST_READY:  # ever new sizes or addresses
            _ready.clear()
        addresses = {id(t): t.data_ptr() for t in given if t is not None}
        arguments = _replaced(recorder(*launch, None, None, None, *arguments), addresses)
        _ready[key] = (recorder.native, arguments)
        recorder.native(*arguments)


_address = Tensor.data_ptr
_this_thread = threading.local()


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Launch nothing in this thread: what is called begins to compile, and gives any numbers.

    Where a launch was repeated before with tensors at the same addresses, it runs.
    """
    _this_thread.compiles_only = True
    try:
        yield
    finally:
        _this_thread.compiles_only = False


# What has begun to compile ahead of its launch.
_begun: dict[tuple, Ahead] = {}


def begun() -> list[Ahead]:
    """List the kernels that began to compile ahead of their launch."""
    return list(_begun.values())


# The native launch function and its arguments, by launch, stream and addresses: 3 KB each.
_ready: dict[tuple, tuple[Callable, tuple]] = {}
MOST_READY = 4096


def _hooked() -> bool:
    """Return whether anyone listens to launches: a function, or a chain of them that has some."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _check_device(tensors, index: int | None) -> None:
    """Raise ValueError for a tensor elsewhere: the native launch function gets addresses alone."""
    for t in tensors:
        if t is not None and (t.device.type != "cuda" or t.device.index != index):
            raise ValueError(
                f"a tensor of shape {tuple(t.shape)} is on {t.device}; expected cuda:{index}, "
                "where the input is"
            )


# What Triton's launcher holds in 3.6 and 3.9. One that holds anything else is left to itself.
_LAUNCHER = {
    "arg_annotations",
    "global_scratch_align",
    "global_scratch_size",
    "gsan_enabled",
    "kernel_signature",
    "launch",
    "launch_cooperative_grid",
    "launch_pdl",
    "num_ctas",
    "profile_scratch_align",
    "profile_scratch_size",
}


class Recorder:
    """Record what Triton's launcher would pass to the native launch function.

    It is a copy of the launcher that ends in a list. Called as the launcher is, it returns what
    that would pass to ``native``: descriptors have become the 128 bytes that the hardware reads,
    tensors are still tensors.
    """

    def __init__(self, run, native: Callable, launch: Callable, calls: list):
        self.native = native
        self.run = copy.copy(run)
        self.run.launch = launch
        self.calls = calls
        self.lock = threading.Lock()

    def __call__(self, *args) -> tuple:
        """Return the native function's arguments."""
        with self.lock:
            self.run(*args)
            return self.calls.pop()


def recorder_of(run) -> Recorder | None:
    """Return a recorder for the launcher of a compiled kernel (Triton's ``CudaLauncher``).

    Returns:
        ``None`` where Triton is not as known here, or where a launch cannot be repeated: with
        scratch memory, which comes anew each time, or under its sanitizer, which counts launches.
    """
    if (
        type(run).__name__ != "CudaLauncher"
        or not vars(run).keys() <= _LAUNCHER
        or run.global_scratch_size
        or run.profile_scratch_size
        or getattr(run, "gsan_enabled", False)
    ):
        return None
    calls: list[tuple] = []

    def record(*args):
        calls.append(args)

    native: Callable = run.launch
    launch: Callable = record
    if isinstance(native, types.FunctionType):
        # Encodes descriptors and goes on to the native function, which it knows as `launcher`.
        encode, names = native, native.__code__.co_freevars
        if "launcher" not in names:
            return None
        cells = list(encode.__closure__ or ())
        at = names.index("launcher")
        native, cells[at] = cells[at].cell_contents, types.CellType(record)
        code = (encode.__code__, encode.__globals__, encode.__name__, encode.__defaults__)
        launch = types.FunctionType(*code, tuple(cells))
    return Recorder(run, native, launch, calls)


def _replaced(value: tuple | list, addresses: dict[int, int]):
    """Replace tensors, also those in tuples and lists within, by addresses: none is kept."""
    return type(value)(
        [
            _replaced(v, addresses) if type(v) in (tuple, list) else addresses.get(id(v), v)
            for v in value
        ]
    )
