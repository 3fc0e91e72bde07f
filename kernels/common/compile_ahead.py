"""Compiling kernels side by side, in threads, before their first launches need them.

Most of a compilation is native code and ptxas, which leave Python's lock to others (Triton 3.6 and
3.9). The rest, Python code that writes a kernel's first form, is done for one kernel after the
other, in the order in which they were begun: all at once, the first would be as late as the last.
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
    """Compiles a kernel as its launch with these arguments would, into Triton's caches.

    What goes wrong is dropped: the launch then compiles itself, and its caller sees the error.
    When the program ends, what has not begun never will. Nothing is loaded onto the GPU, where
    another thread may be capturing a graph.
    """

    def __init__(self, kernel, device: int, arguments: list, options: dict):
        global _last
        super().__init__(name="fastadapt compiles")
        self.kernel, self.device = kernel, device
        self.arguments, self.options = arguments, options
        self.written = threading.Event()
        self.launcher = None
        self.turn = _begin() if _last is None else _last.written.wait
        _prepare(kernel, device)
        self.start()
        _last = self

    def run(self) -> None:
        self.turn()
        with _places, contextlib.suppress(Exception):
            if threading.main_thread().is_alive():
                driver.active.set_current_device(self.device)  # this thread's
                self.kernel.warmup(*self.arguments, grid=(1,), **self.options)
        self.written.set()  # also if it was on disk
        if self.launcher is not None:
            self.launcher.join()
        del self.turn  # and all that came before

    def goes_on(self, source) -> None:
        """Lets the next kernel begin, now that this one's first form is written."""
        self.written.set()
        self.launcher = threading.Thread(target=_make_launcher, args=(source,))
        self.launcher.start()


_last: Ahead | None = None
_places = threading.Semaphore(os.cpu_count() or 1)


@functools.cache
def _begin():
    """Triton's first steps in a process, side by side: the hash of itself, 400 MB, that it keeps
    every kernel under, and its driver, which 3.6 has a C compiler make.

    Returns:
        What waits for the hash.
    """
    hashing = threading.Thread(target=cache.triton_key, name="fastadapt hashes Triton")
    hashing.start()
    if hasattr(code_generator, "warnings"):
        code_generator.warnings = _Warnings()
    driver.active.get_current_device()
    return hashing.join


class _Warnings:
    """The module, for Triton 3.6, which silences some while it writes a kernel's first form.

    Not in our threads: filters are the whole process's, and the caller may be changing them.
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
    """Over Triton's class of a kernel's source: tells its thread that the first form is written."""

    def make_ir(self, *args, **options):
        module = super().make_ir(*args, **options)
        if _in_thread():
            threading.current_thread().goes_on(self)
        return module


class _Metadata:
    """Of a kernel that is not yet compiled, as far as its launcher's code depends on it: whether
    descriptors go as the hardware's, from Hopper on.
    """

    def __init__(self, source):
        descriptors = sum(str(t).startswith("tensordesc") for t in source.signature.values())
        hopper = driver.active.get_current_target().arch >= 90
        self.tensordesc_meta = [{}] * descriptors if hopper else []

    def __getattr__(self, name):
        return 0


def _make_launcher(source) -> None:
    """Has Triton 3.6 call its C compiler, for the launch to find the launcher in the cache."""
    with contextlib.suppress(Exception):
        driver.active.launcher_cls(source, _Metadata(source))


def _prepare(kernel, device: int) -> None:
    kernel.device_caches[device]  # Two threads at once would make two, and one be lost.
    if not issubclass(kernel.ASTSource, _Source):
        kernel.ASTSource = type("Source", (_Source, kernel.ASTSource), {})
