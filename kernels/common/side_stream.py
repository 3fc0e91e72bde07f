"""Matrix products of a backward: in the dtype that is wanted, and on a side stream."""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor


def mm(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Multiply a and b; the result is in ``dtype``, theirs if ``None``.

    Gradients in fp32 of operands in half precision leave the product as they were summed: neither
    rounded on the way, nor widened by a kernel of their own.
    """
    if dtype in (None, a.dtype):
        return torch.mm(a, b, out=out)
    if dtype == torch.float32 and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    product = torch.mm(a, b).to(dtype)
    return product if out is None else out.copy_(product)


class Branch:
    """Run matrix products on a side stream where a CUDA graph is captured, else on the current.

    In the graph they are a branch of their own: its kernels take the multiprocessors that those of
    the other branch leave idle, at their beginnings and ends and in small grids. Eager calls wait
    for the host, not for multiprocessors, and a second stream would cost it more time.

    Memory: what a product reads is held until :meth:`join`, and cuBLAS has a workspace for each
    stream (32 MiB on Hopper).
    """

    def __init__(self, device: torch.device):
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.stream = _stream(device.index, threading.get_ident())
        self.held: list[Tensor] = []

    @property
    def beside(self) -> bool:
        """Whether products run on a side stream."""
        return self.stream is not None

    def mm(self, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Multiply as :func:`mm` does; the result may be read after :meth:`join` only."""
        if self.stream is None:
            return mm(a, b, dtype)
        # Of the current stream, as all that outlives the branch.
        out = a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            mm(a, b, dtype, out)
        self.held += (a, b)
        return out

    def join(self) -> None:
        """Have the current stream wait for all products."""
        if self.stream is not None and self.held:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.held.clear()


@functools.cache
def _stream(device: int, thread: int) -> torch.cuda.Stream:
    # Kept: every stream that cuBLAS meets gets a workspace. Two captures at once need two streams.
    return torch.cuda.Stream(device)
