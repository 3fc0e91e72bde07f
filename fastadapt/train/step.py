"""One step of training, as all training loops take it, and the losses of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.cuda_graph import GraphedStep
from fastadapt.train.halving import Full, free_memory

if TYPE_CHECKING:
    from fastadapt.train.gradient_sum import GradientSum

IGNORED = -100  # the label of rows that cross-entropy leaves out


def training_step(
    logits: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    *,
    scaler: torch.amp.GradScaler | None = None,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    clip_grad: float | None = None,
    graph: bool = False,
    say: Callable[[str], object] | None = None,
    sums: GradientSum | None = None,
    on_full: Full | None = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make a function that takes one step: forward, cross-entropy, backward, clipping, optimizer.

    Args:
        logits: of the inputs, [B, classes].
        optimizer: over all that trains, its state loaded; on a GPU with ``fused=True``. Its
            learning rate belongs to the step from now on; a group learns ``lr_scale`` times as
            fast, if it has that.
        autocast: makes the context of the forward pass.
        scaler: of the loss, for fp16.
        class_weights: [classes], of the loss.
        label_smoothing: share of the target that is spread over all classes.
        clip_grad: largest norm of the gradient.
        graph: on a GPU, replay a CUDA graph (:class:`fastadapt.GraphedStep`), unless the loss is
            scaled. The graph's memory is freed with the function.
        say: as for :class:`fastadapt.GraphedStep`.
        sums: of the gradients over processes, each of which takes the step with its share of the
            batch; rows without an image have the label ``IGNORED``, or shares of 0.
        on_full: called with a number of parts when a batch does not fit into the GPU's memory
            (:func:`fastadapt.train.halving.halving`); from then on gradients are added up over so
            many parts. Without it, and with several processes, the error is raised.

    Returns:
        ``step(lr, labels, *inputs)``, which gives the loss and the number of right predictions,
        both on the device; it never waits for a GPU. Labels are [B] int64, or the share of each
        class, [B, classes] fp32, as mixup gives them.
    """
    groups = optimizer.param_groups
    trained = [p for group in groups for p in group["params"]]
    device = trained[0].device
    rates = _Rates([group.get("lr_scale", 1.0) for group in groups], device)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)

    parts = 1

    def add_gradients(labels: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Add up the gradients of the parts of a batch; return its loss and right predictions."""
        total = row_weights(labels, class_weights)[0].sum()
        loss, right = total.new_zeros(()), labels.new_zeros((), dtype=torch.int64)
        pieces = zip(*(tensor.chunk(parts) for tensor in (labels, *inputs)), strict=True)
        for piece, *rows in pieces:
            with autocast():
                y = logits(*rows)
            share = cross_entropy(y.float(), piece, class_weights, label_smoothing, mean=False)
            share = share / total
            with torch.autograd.set_multithreading_enabled(False):
                scaler.scale(share).backward()
            loss = loss + share.detach()
            right = right + (y.detach().argmax(1) == _true(piece)).sum()
        return loss, right

    def whole(labels: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a batch; return its loss and right predictions."""
        if sums is not None:
            sums.begin(*row_weights(labels, class_weights))
        with autocast(), nullcontext() if sums is None else sums.batch_statistics():
            y = logits(*inputs)
        loss = cross_entropy(y.float(), labels, class_weights, label_smoothing, mean=sums is None)
        right = (y.detach().argmax(1) == _true(labels)).sum()
        if sums is not None:
            loss = sums.share_of_loss(loss, right)
        # In this thread: a thread of autograd's would have a workspace of cuBLAS of its own.
        with torch.autograd.set_multithreading_enabled(False):
            scaler.scale(loss).backward()
        return (loss, right) if sums is None else sums.end()

    def train(labels: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        loss, right = (whole if parts == 1 else add_gradients)(labels, *inputs)
        if clip_grad is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, clip_grad)
        for group in groups:
            # Fused optimizers always are. PyTorch warns if this is set where nothing is captured.
            if "capturable" in group and device.type == "cuda":
                group["capturable"] = torch.cuda.is_current_stream_capturing()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), right

    def graphed() -> Callable[..., Any]:
        return GraphedStep(train, say=say) if graph and not scaler.is_enabled() else train

    run = graphed()

    def step(lr: float, labels: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal parts, run
        for group, rate in zip(groups, rates.at(lr), strict=True):
            group["lr"] = rate
        while True:
            try:
                return run(labels, *inputs)
            except torch.OutOfMemoryError:
                if on_full is None or sums is not None or 2 * parts > len(labels):
                    raise
            # After the handler, whose error holds what the failed step had made.
            optimizer.zero_grad(set_to_none=True)
            on_full(2 * parts)
            parts, run = 2 * parts, graphed()
            free_memory()

    return step


def _true(labels: Tensor) -> Tensor:
    """Return the class of each row, of classes or of shares."""
    return labels if labels.dim() == 1 else labels.argmax(1)


class _Rates:
    """The learning rates of an optimizer's groups.

    On a GPU they are tensors, fp32, that the optimizer's kernels read: a number would be part of
    the graph.
    """

    def __init__(self, scales: list[float], device: torch.device):
        self._scales = scales
        self._one = len(set(scales)) == 1
        self._rates: Tensor | None = None
        if device.type == "cuda":
            self._on_device = torch.tensor(scales, dtype=torch.float32, device=device)
            self._rates = torch.zeros_like(self._on_device)

    def at(self, lr: float) -> list[Any]:
        """Return the rate of each group where adapter and head have ``lr``."""
        if self._rates is None:
            return [lr * scale for scale in self._scales]
        if self._one:
            self._rates.fill_(lr * self._scales[0])
            return [self._rates[0]] * len(self._scales)
        torch.mul(self._on_device, lr, out=self._rates)
        return list(self._rates.unbind())


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
    *,
    mean: bool = True,
) -> Tensor:
    """Return the mean cross-entropy of a batch.

    Of labels that are shares s, with the weights w of the classes and smoothing ε, it is

        Σ_n Σ_k ((1 − ε) s_nk + ε / K) w_k (−log p_nk)  /  Σ_n Σ_k s_nk w_k

    over the rows whose shares are not all 0, which for one class a row is what PyTorch computes
    of its label.

    Args:
        logits: [B, K], fp32.
        labels: [B] int64, or the shares of the classes, [B, K] fp32; all 0 in rows to leave out.
        weights: [K], of the classes.
        smoothing: share of the target that is spread over all classes.
        mean: divide by the rows' weights; else the numerator alone.
    """
    if labels.dim() == 1:
        reduction = "mean" if mean else "sum"
        return F.cross_entropy(
            logits, labels, weights, label_smoothing=smoothing, reduction=reduction
        )
    weighted = -logits.log_softmax(1)
    if weights is not None:
        weighted = weighted * weights
    counted = labels.sum(1, keepdim=True)  # 1, or 0 in rows to leave out
    target = (1 - smoothing) * labels + smoothing / logits.shape[1] * counted
    total = (target * weighted).sum()
    return total / row_weights(labels, weights)[0].sum() if mean else total


def row_weights(labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what each row of a batch counts in the mean loss, and which rows count at all.

    Args:
        labels, weights: as for :func:`cross_entropy`.

    Returns:
        [B] fp32 and [B] bool.
    """
    if labels.dim() == 1:
        valid = labels != IGNORED
        ones = valid.float()
        return (ones if weights is None else ones * weights[labels * valid]), valid
    return (labels if weights is None else labels * weights).sum(1), labels.sum(1) > 0


class Losses:
    """Add up an epoch's losses. Those of a GPU are read every few steps: reading waits for it.

    Args:
        check: called with every loss and its step, from 1, when it is read; may raise.
    """

    EVERY = 16

    def __init__(self, check: Callable[[float, int], None]):
        self.note = ""
        self.is_read = False  # whether the last call of `add` read losses
        self._check = check
        self._waiting: list[tuple[Tensor, int]] = []
        self._read = 0
        self._sum = 0.0

    def add(self, loss: Tensor, count: int) -> None:
        """Add the mean loss of a batch of ``count`` images."""
        self._waiting.append((loss, count))
        self.is_read = not loss.is_cuda or len(self._waiting) == self.EVERY
        if self.is_read:
            self.total()

    def total(self) -> float:
        """Return the sum over all images so far."""
        if self._waiting:
            values = torch.stack([loss for loss, _ in self._waiting]).tolist()
            for value, (_, count) in zip(values, self._waiting, strict=True):
                self._read += 1
                self._check(value, self._read)
                self._sum += value * count
            self.note = f"loss {value:.3f}"
            self._waiting.clear()
        return self._sum
