"""Compile kernels in parallel threads, before their first launches need them.

Most of a compilation is native code and ptxas, which release Python's lock (Triton 3.6 to 3.9). The
rest, Python code that makes a kernel's first intermediate representation (IR), is done for one
kernel after the other, in the order in which they were begun: all at once, the first would be as
late as the last.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings

from triton.compiler import code_generator
from triton.runtime import cache, driver


class Ahead(threading.Thread):
    """Compile a kernel as its launch with these arguments would, into Triton's caches.

    Errors are dropped: the launch then compiles itself, and its caller sees the error. When the
    program ends, compilations that have not begun never will. Nothing is loaded onto the GPU, where
    another thread may be capturing a graph.
    """

    def __init__(self, kernel, device: int, arguments: list, options: dict):
        global _last
        super().__init__(name="fastadapt compiles")
        self.kernel, self.device = kernel, device
        self.arguments, self.options = arguments, options
        self.ir_made = threading.Event()
        self.launcher: threading.Thread | None = None
        self.turn = _begin() if _last is None else _last.ir_made.wait
        _prepare(kernel, device)
        self.start()
        _last = self

    def run(self) -> None:
        """Wait for the kernels before this one to have their IR, and compile."""
        self.turn()
        with _slots, contextlib.suppress(Exception):
            if threading.main_thread().is_alive():
                driver.active.set_current_device(self.device)  # this thread's
                self.kernel.warmup(*self.arguments, grid=(1,), **self.options)
        self.ir_made.set()  # also if the kernel was on disk
        if self.launcher is not None:
            self.launcher.join()
        del self.turn  # which refers to the thread before, and that to all before it

    def next_may_begin(self, source) -> None:
        """Let the next kernel begin, now that this one's IR is made."""
        self.ir_made.set()
        self.launcher = threading.Thread(target=_make_launcher, args=(source,))
        self.launcher.start()


_last: Ahead | None = None
_slots = threading.Semaphore(os.cpu_count() or 1)


@functools.cache
def _begin():
    """Take Triton's first steps in a process, in parallel.

    They are the hash of Triton itself, 400 MB, that is part of every kernel's key in its cache, and
    its driver, for which 3.6 calls a C compiler.

    Returns:
        A function that waits for the hash.
    """
    hashing = threading.Thread(target=cache.triton_key, name="fastadapt hashes Triton")
    hashing.start()
    if hasattr(code_generator, "warnings"):  # no other way to reach it; see _Warnings
        code_generator.warnings = _Warnings()
    driver.active.get_current_device()
    return hashing.join


class _Warnings:
    """Stand for Python's module in Triton 3.6, which silences warnings while it makes IR.

    In our threads it must not: filters belong to the whole process, and the caller may be changing
    them.
    """

    def __getattr__(self, name):
        return getattr(warnings, name)

    def catch_warnings(self, **options):
        return contextlib.nullcontext() if _in_thread() else warnings.catch_warnings(**options)

    def simplefilter(self, *args, **options):
        if not _in_thread():
            warnings.simplefilter(*args, **options)


def _in_thread() -> bool:
    return isinstance(threading.current_thread(), Ahead)


class _Source:
    """Mixed into Triton's class of a kernel's source: tells its thread that the IR is made."""

    def make_ir(self, *args, **options):
        module = super().make_ir(*args, **options)
        if _in_thread():
            threading.current_thread().next_may_begin(self)
        return module


class _Metadata:
    """Stand for the metadata of a kernel that is not yet compiled.

    A launcher's code depends on whether descriptors are the hardware's, which they are from Hopper
    on.
    """

    def __init__(self, source):
        descriptors = sum(str(t).startswith("tensordesc") for t in source.signature.values())
        hopper = driver.active.get_current_target().arch >= 90
        self.tensordesc_meta = [{}] * descriptors if hopper else []

    def __getattr__(self, name):
        return 0


def _make_launcher(source) -> None:
    """Have Triton 3.6 call its C compiler, for the launch to find the launcher in the cache."""
    with contextlib.suppress(Exception):
        driver.active.launcher_cls(source, _Metadata(source))


def _prepare(kernel, device: int) -> None:
    kernel.device_caches[device]  # Two threads at once would make two, and one be lost.
    if not issubclass(kernel.ASTSource, _Source):
        kernel.ASTSource = type("Source", (_Source, kernel.ASTSource), {})
