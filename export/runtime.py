"""The interface of every runtime of a bundle's files: arrays or tensors in, the same out."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from fastadapt.errors import InputError, first_line

CORE_ML = "Core ML"  # the runtime's name where it chooses processor, GPU or Neural Engine


class RuntimeUnavailable(InputError):
    """Report that this machine cannot run a file, and why; another machine may."""


class Runtime:
    """A loaded file: images [B, ...] to outputs [B, outputs].

    Attributes:
        name: for tables, ``"ONNX Runtime, CPU"`` for one.
        providers: the libraries that compute, in the order in which they are preferred.
        device: ``"cpu"`` or ``"cuda"``.
    """

    name: str
    providers: tuple[str, ...]
    device: str

    @overload
    def __call__(self, *inputs: Tensor) -> Tensor: ...

    @overload
    def __call__(self, *inputs: np.ndarray) -> np.ndarray: ...

    def __call__(self, *inputs: Any) -> Any:
        """Run a batch, and return the first output: logits, or features without a head.

        Args:
            inputs: all arrays or all tensors, in the order, dtypes and layouts of the file's
                inputs; images come first. Tensors may be on any device.

        Raises:
            InputError: the runtime fails, at this batch size perhaps.
        """
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: Any) -> tuple[Any, ...]:
        """Run a batch as :meth:`__call__` does, and return all outputs."""
        try:
            if isinstance(inputs[0], Tensor):
                return self.run_tensors(*(x.to(self.device).contiguous() for x in inputs))
            return self.run_arrays(*map(np.ascontiguousarray, inputs))
        except Exception as error:  # the runtimes' own exceptions have no common base
            raise InputError(
                f"{self.name} fails at batch size {len(inputs[0])}: {first_line(error)}"
            ) from error

    def run_tensors(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run contiguous tensors that are on the runtime's device; return all outputs."""
        return tuple(map(torch.from_numpy, self.run_arrays(*(x.numpy() for x in inputs))))

    def run_arrays(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run contiguous arrays; return all outputs."""
        tensors = (torch.from_numpy(x).to(self.device) for x in inputs)
        return tuple(output.cpu().numpy() for output in self.run_tensors(*tensors))


def usable_cores() -> int:
    """Count the physical cores that this process may use, by its affinity and container limit.

    Two threads on one core wait for each other in products of matrices, and more threads than
    the limit allows are all stopped at once.
    """
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not on Windows or macOS
        return os.cpu_count() or 1
    siblings = set()
    for cpu in cpus:
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(file.read_text().strip() if file.is_file() else str(cpu))
    cores = len(siblings)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores
