"""What every operation needs before it starts: which backend runs it, and in which dtype."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Sequence

import torch

BACKENDS = ("auto", "triton", "reference")


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


def choose_backend(backend: str, why_not_triton: str | None, *, by_default: bool = True) -> str:
    """Returns ``"triton"`` or ``"reference"``.

    Args:
        backend: ``"auto"``, ``"triton"`` or ``"reference"``. The environment variable
            ``FASTADAPT_BACKEND`` takes the place of ``"auto"``.
        why_not_triton: the reason why the kernels cannot run this call, ``None`` if they can.
        by_default: whether ``"auto"`` takes the kernels where they can run; not where the
            reference is faster.

    Raises:
        ValueError: ``backend`` is none of the three.
        BackendError: ``"triton"`` was asked for and cannot be had.
    """
    if backend == "auto":
        backend = os.environ.get("FASTADAPT_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "triton" and why_not_triton is not None:
        raise BackendError(
            f"backend 'triton' cannot run this call: {why_not_triton}. "
            "Use backend='auto' to fall back to the reference."
        )
    if backend == "auto":
        return "triton" if by_default and why_not_triton is None else "reference"
    return backend


def weights_in_dtype_of_x(args: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """An operation's arguments: x, two more, then two linear layers, whose weights are cast."""
    x, second, third, weight, bias, other_weight, other_bias = args
    return x, second, third, cast(weight, x.dtype), bias, cast(other_weight, x.dtype), other_bias


def dtypes_of_weights(args: Sequence[torch.Tensor | None]) -> tuple[torch.dtype | None, ...]:
    """Of the same arguments."""
    return tuple([None if t is None else t.dtype for t in (args[3], args[5])])


def cast(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def is_exporting() -> bool:
    """Whether ``torch.export`` traces, and not ``torch.compile``.

    PyTorch's function of this name, which reads the flag, is true for both in PyTorch 2.11.
    """
    return torch.compiler._is_exporting_flag


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def why_not_device(x: torch.Tensor) -> str | None:
    """Why Triton kernels cannot run on the device of ``x``; ``None`` if they can.

    Under ``TRITON_INTERPRET=1`` they run on the CPU, to be tested there.
    """
    if not _HAS_TRITON:
        return "triton is not installed"
    if x.is_cuda:
        ask = _why_not_gpu if torch.compiler.is_compiling() else _why_not_gpu_once
        return ask(x.device.index)
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"x is on device {x.device}"


def _why_not_gpu(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return f"compute capability {major}.{minor}; they need 8.0" if major < 8 else None


_why_not_gpu_once = functools.cache(_why_not_gpu)


_NOTHING = contextlib.nullcontext()


def _kind(x: torch.Tensor) -> str:
    """The device's type; asking the device itself takes longer."""
    return "cuda" if x.is_cuda else x.device.type


def on_device(x: torch.Tensor):
    """Makes the GPU of ``x`` the current one, where it is not: Triton launches on that."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)


def without_autocast(x: torch.Tensor):
    """Switches autocast off where it is on; entering its context costs as much as a launch."""
    if not torch.is_autocast_enabled(_kind(x)):
        return _NOTHING
    return torch.autocast(x.device.type, enabled=False)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that an operation on ``x`` computes in: autocast's where autocast is on."""
    kind = _kind(x)
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
