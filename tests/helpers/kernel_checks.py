"""Shared by the tests of all operations with kernels: where they run, and how exact is enough."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fastadapt.bench.harness import relative_error

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
RANDOM_CASES = int(os.environ.get("FASTADAPT_RANDOM_CASES", "12"))
FIRST_CASE = int(os.environ.get("FASTADAPT_FIRST_CASE", "0"))

interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in a process with the interpreter")
starts_interpreter = pytest.mark.skipif(INTERPRETING, reason="starts that process")
gpu = pytest.mark.gpu


def run_interpreted(*files: str) -> None:
    """Run the interpreted tests of files: Triton must be imported anew for its interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *files]
    done = subprocess.run(
        [*command, "-k", "interpreted"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def output_and_gradients(
    function: Callable[..., Tensor],
    args: Sequence[Tensor | None],
    g: Tensor,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """y = function(*args), then the gradients of all that are tensors; ``dtype``: of the copies."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in args]
    y = function(*leaves)
    asked = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, asked, g.to(y.dtype))]


FEW = 1000  # values below which PyTorch can be lucky


def few_values(name: str, exact: Tensor) -> bool:
    """Say whether a result has few values, with which PyTorch can be lucky."""
    return exact.numel() < FEW


def beyond_pytorch(
    names: Sequence[str],
    ours: Sequence[Tensor],
    reference: Sequence[Tensor],
    truth: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    *,
    few: Callable[[str, Tensor], bool] = few_values,
    cancellation: Mapping[str, float] | None = None,
    may_overflow: bool = True,
) -> list[str]:
    """Find the results that have more than twice PyTorch's error in the same dtype.

    Args:
        names: of the results.
        ours, reference, truth: of the kernels, of PyTorch, and in fp64.
        dtype: in which was computed; each result's own if ``None``.
        few: whether a result has so few values that 2 eps more are allowed.
        cancellation: for results that are sums of few values, how many times the norm of the sum
            the norm of its terms is. Terms are rounded, so that the error of a sum that nearly
            cancels is in proportion to them: the 2 eps are of their norm.
        may_overflow: leave out what is beyond fp16's range in PyTorch as well.
    """
    found = []
    for name, mine, theirs, exact in zip(names, ours, reference, truth, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, name
        if may_overflow and not torch.isfinite(theirs).all():
            continue
        error, limit = relative_error(mine, exact), relative_error(theirs, exact)
        slack = 1e-7
        if few(name, exact):
            slack = 2 * torch.finfo(dtype or mine.dtype).eps
            slack *= max(1.0, (cancellation or {}).get(name, 1.0))
        if not error <= 2 * limit + slack:
            found.append(f"{name}: {error:.2e}, PyTorch {limit:.2e}")
    return found
