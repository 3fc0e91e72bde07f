"""Compiling kernels side by side, in threads, before their first launches need them.

Most of a compilation is native code and ptxas, which leave Python's lock to others (Triton 3.6 and
3.9). The rest, Python code that writes a kernel's first form, is done for one kernel after the
other: all at once, the first would be as late as the last.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading

from triton.runtime import cache, driver


class Ahead(threading.Thread):
    """Compiles a kernel as its launch with these arguments would, into Triton's caches.

    What goes wrong is dropped: the launch then compiles itself, and its caller sees the error.
    When the program ends, what has not begun never will. Nothing is loaded onto the GPU, where
    another thread may be capturing a graph.
    """

    def __init__(self, kernel, device: int, arguments: list, options: dict):
        super().__init__(name="fastadapt compiles")
        self.kernel, self.device = kernel, device
        self.arguments, self.options = arguments, options
        self.claim = threading.Lock()
        self.hashing = _begin()
        _in_turn(kernel, device)
        self.start()

    def run(self) -> None:
        self.hashing.join()
        with _cores, contextlib.suppress(Exception):
            if threading.main_thread().is_alive() and self.claim.acquire(blocking=False):
                driver.active.set_current_device(self.device)  # this thread's
                compiled = self.kernel.warmup(*self.arguments, grid=(1,), **self.options)
                # In 3.6 a C compiler makes it. This one goes; its cache on disk stays.
                driver.active.launcher_cls(compiled.src, compiled.metadata)

    def finish(self) -> None:
        """Returns once it is through; at once if it had not begun, and then it never will."""
        if not self.claim.acquire(blocking=False):
            self.join()


_cores = threading.Semaphore(os.cpu_count() or 1)


@functools.cache
def _begin() -> threading.Thread:
    """Triton's first steps in a process, side by side: the hash of itself, 400 MB, that it keeps
    every kernel under, and its driver, which 3.6 has a C compiler make.
    """
    hashing = threading.Thread(target=cache.triton_key, name="fastadapt hashes Triton")
    hashing.start()
    driver.active.get_current_device()
    return hashing


class _InTurn:
    """Over Triton's class of a kernel's source."""

    lock = threading.Lock()

    def make_ir(self, *args, **options):
        with self.lock:
            return super().make_ir(*args, **options)


def _in_turn(kernel, device: int) -> None:
    kernel.device_caches[device]  # Two threads at once would make two, and one be lost.
    if not issubclass(kernel.ASTSource, _InTurn):
        kernel.ASTSource = type("Source", (_InTurn, kernel.ASTSource), {})
