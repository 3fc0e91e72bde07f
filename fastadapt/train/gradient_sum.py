"""Add up the gradients of several processes, while the backward pass goes on.

With processes r = 1…P, their images B_r of a batch, a weight w_i of each image (1, or that of its
class) and losses l_i, one process would minimize

1. L = Σ_r Σ_{i∈B_r} w_i l_i / W,  W = Σ_r Σ_{i∈B_r} w_i.

Each process computes

2. W, a sum over processes that is under way during the forward pass;
3. L_r = Σ_{i∈B_r} w_i l_i / W and its gradients g_r, whose sum over processes is that of L, however
   the images are split: no share needs to be as large as another.

Gradients are summed in buckets, from the last parameters to the first, which is about the order in
which the backward pass makes them: a bucket is sent as soon as its gradients are there. On a GPU
NCCL sums on a stream of its own, beside the rest of the backward pass. All of it can be captured in
a CUDA graph: nothing waits for the host.

Source: PyTorch Distributed (Li et al., VLDB 2020), section 3.2.3, for buckets and their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastadapt.train.synced_batch_norm import SyncedBatchNorms, has_batch_norms

# Small enough to begin early and for the last one to be short, large enough for NCCL's full rate.
BUCKET_BYTES = 16 << 20


@dataclass
class _Bucket:
    """Parameters whose gradients travel together.

    Attributes:
        parameters: of one dtype.
        views: where the gradient of each is in the buffer, with the parameter's strides.
        buffer: [values], as they are sent.
        missing: gradients of this pass that are not there yet.
        work: the sum under way.
    """

    parameters: list[nn.Parameter]
    views: list[Tensor]
    buffer: Tensor
    missing: int = 0
    work: dist.Work | None = None
    ready: list[bool] = field(default_factory=list)


class GradientSum:
    """Sums of gradients, losses and counts over processes, for one step after the other.

    A step calls :meth:`begin`, :meth:`share_of_loss` and :meth:`end`, in this order, with the
    backward pass before the last. The hooks on the parameters stay until :meth:`close`.

    Args:
        model: whose parameters that require gradients are trained.
        group: the processes.
        bucket_bytes: the size from which a bucket is full.
    """

    def __init__(
        self, model: nn.Module, group: dist.ProcessGroup, bucket_bytes: int = BUCKET_BYTES
    ):
        self.group = group
        parameters = [p for p in model.parameters() if p.requires_grad]
        device = parameters[0].device
        # Written by the host between steps; read by every step, captured or not.
        self.stop = torch.zeros((), device=device)
        self._stops = torch.zeros((), device=device)
        self._total = torch.zeros((), device=device)
        self._valid: Tensor | None = None
        self._total_work: dist.Work | None = None
        self._sums_work: dist.Work | None = None
        self._sums = self._total
        self._synced = has_batch_norms(model)
        self._buckets = _buckets(parameters, bucket_bytes)
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._hook(bucket, place))
            for bucket in self._buckets
            for place, p in enumerate(bucket.parameters)
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self, weights: Tensor, valid: Tensor) -> None:
        """Begin a step: start to sum the weights of the batch's images.

        Args:
            weights: [B], of this process's images; 0 of those that do not count.
            valid: [B] bool, which of them count.
        """
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
            bucket.ready = [False] * bucket.missing
            bucket.work = None
        self._valid = valid
        self._total = weights.sum(dtype=torch.float32)
        self._total_work = self._add_up(self._total)

    @contextmanager
    def batch_statistics(self) -> Iterator[None]:
        """Let batch norms that train take the statistics of the whole batch."""
        if not self._synced:
            yield
            return
        assert self._valid is not None
        with SyncedBatchNorms(self._valid, self.group):
            yield

    def share_of_loss(self, summed: Tensor, right: Tensor) -> Tensor:
        """Return this process's share of the batch's mean loss, equation 3.

        Args:
            summed: weighted losses of this process's images, added up.
            right: number of right predictions of this process.
        """
        assert self._total_work is not None
        self._total_work.wait()
        share = summed / self._total
        values = (share.detach().float(), right.float(), self.stop)
        self._sums = torch.stack(values)
        self._sums_work = self._add_up(self._sums)
        return share

    def end(self) -> tuple[Tensor, Tensor]:
        """Wait for all sums; gradients are those of the whole batch then.

        Returns:
            The batch's mean loss, and the number of right predictions.
        """
        for bucket in self._buckets:
            if bucket.work is None:  # some parameters have no gradient
                self._send(bucket)
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            for parameter, view, ready in zip(
                bucket.parameters, bucket.views, bucket.ready, strict=True
            ):
                if ready:
                    parameter.grad = view
        assert self._sums_work is not None
        self._sums_work.wait()
        self._stops.copy_(self._sums[2])
        return self._sums[0], self._sums[1]

    @property
    def asked_to_stop(self) -> bool:
        """Whether a process had ``stop`` set in the last step. Waits for a GPU."""
        return bool(self._stops.item())

    def _hook(self, bucket: _Bucket, place: int):
        def arrived(_: Tensor) -> None:
            bucket.ready[place] = True
            bucket.missing -= 1
            if bucket.missing == 0:
                self._send(bucket)

        return arrived

    def _send(self, bucket: _Bucket) -> None:
        views, gradients = [], []
        for parameter, view, ready in zip(
            bucket.parameters, bucket.views, bucket.ready, strict=True
        ):
            if ready:
                assert parameter.grad is not None
                views.append(view)
                gradients.append(parameter.grad)
        if views:
            torch._foreach_copy_(views, gradients)
        bucket.work = self._add_up(bucket.buffer)

    def _add_up(self, values: Tensor) -> dist.Work:
        work = dist.all_reduce(values, group=self.group, async_op=True)
        assert work is not None
        return work


def _buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[_Bucket]:
    """Cut parameters, last first, into buckets of one dtype."""
    groups: list[list[nn.Parameter]] = []
    held = 0
    for parameter in reversed(parameters):
        if not groups or held >= bucket_bytes or groups[-1][0].dtype != parameter.dtype:
            groups.append([])
            held = 0
        groups[-1].append(parameter)
        held += parameter.numel() * parameter.element_size()
    return [_bucket(group) for group in groups]


def _bucket(parameters: list[nn.Parameter]) -> _Bucket:
    count = sum(p.numel() for p in parameters)
    buffer = torch.zeros(count, dtype=parameters[0].dtype, device=parameters[0].device)
    views, start = [], 0
    for parameter in parameters:
        # Optimizers update many tensors in one kernel where all of one parameter have its strides.
        views.append(buffer.as_strided(parameter.shape, parameter.stride(), start))
        start += parameter.numel()
    return _Bucket(parameters, views, buffer)
