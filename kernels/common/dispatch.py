"""What every operation decides before it starts: which backend runs it, and in which dtype."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import overload

import torch

BACKENDS = ("auto", "triton", "reference")


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


def choose_backend(backend: str, why_not_triton: str | None, *, by_default: bool = True) -> str:
    """Return ``"triton"`` or ``"reference"``.

    Args:
        backend: ``"auto"``, ``"triton"`` or ``"reference"``. The environment variable
            ``FASTADAPT_BACKEND`` takes the place of ``"auto"``.
        why_not_triton: the reason why the kernels cannot run this call, ``None`` if they can.
        by_default: whether ``"auto"`` takes the kernels where they can run; not where the
            reference is faster.

    Raises:
        ValueError: ``backend`` is none of the three.
        BackendError: the environment variable is none of the three, or ``"triton"`` was asked for
            and cannot be had.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = os.environ.get("FASTADAPT_BACKEND", "auto")
        if backend not in BACKENDS:
            raise BackendError(
                f"the environment variable FASTADAPT_BACKEND is {backend!r}; expected one of "
                f"{', '.join(BACKENDS)}. Set it to one of these, or unset it."
            )
    if backend == "triton" and why_not_triton is not None:
        raise BackendError(
            f"backend 'triton' cannot run this call: {why_not_triton}. "
            "Use backend='auto' to fall back to the reference."
        )
    if backend == "auto":
        return "triton" if by_default and why_not_triton is None else "reference"
    return backend


@overload
def cast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...


@overload
def cast(t: None, dtype: torch.dtype) -> None: ...


def cast(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return t in ``dtype``, itself where it is already."""
    return t if t is None or t.dtype == dtype else t.to(dtype)


def is_exporting() -> bool:
    """Return whether ``torch.export`` traces, and not ``torch.compile``.

    PyTorch's function of this name, which reads the flag, is true for both in PyTorch 2.11.
    """
    return torch.compiler._is_exporting_flag


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def why_not_device(x: torch.Tensor) -> str | None:
    """Return why Triton kernels cannot run on the device of ``x``; ``None`` if they can.

    Under ``TRITON_INTERPRET=1`` they run on the CPU, to be tested there.
    """
    if not _HAS_TRITON:
        return "triton is not installed"
    if x.is_cuda:
        ask = _why_not_index if torch.compiler.is_compiling() else _why_not_index_once
        return ask(x.device.index)
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"x is on device {x.device}"


def why_not_gpu(capability: tuple[int, int], hip: str | None) -> str | None:
    """Return why the kernels cannot run on a GPU that PyTorch calls "cuda"; ``None`` if they can.

    What the GPUs get that can is asked of :class:`fastadapt.kernels.common.launcher.Device`:

    - ROCm: nothing. An MI300 reports capability 9.4 and is no Hopper GPU.
    - below 8.0: nothing; there is no bf16 and no asynchronous copy.
    - 8.x: the Triton kernels. There is no TMA: descriptors become pointers.
    - 9.x: the same with TMA and dependent launch, and for large problems the Hopper kernels.
    - 10.x, 12.x: the Triton kernels with TMA and dependent launch. The instructions of the Hopper
      kernels are not there.

    Args:
        capability: the compute capability, major and minor.
        hip: ``torch.version.hip``.
    """
    if hip is not None:
        return f"PyTorch is built for ROCm {hip}; they are written for NVIDIA GPUs"
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}; they need 8.0"
    return None


def _why_not_index(index: int) -> str | None:
    return why_not_gpu(torch.cuda.get_device_capability(index), torch.version.hip)


_why_not_index_once = functools.cache(_why_not_index)


_NOTHING = contextlib.nullcontext()


def _kind(x: torch.Tensor) -> str:
    """Return the device's type; asking the device itself takes longer."""
    return "cuda" if x.is_cuda else x.device.type


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make the GPU of ``x`` the current one, where it is not: Triton launches on that."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Switch autocast off where it is on; entering its context costs as much as a launch."""
    if not torch.is_autocast_enabled(_kind(x)):
        return _NOTHING
    return torch.autocast(x.device.type, enabled=False)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that an operation on ``x`` computes in: autocast's where autocast is on."""
    kind = _kind(x)
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
