"""One step of training, as all training loops take it, and the losses of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.cuda_graph import GraphedStep


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
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make a function that takes one step: forward, cross-entropy, backward, clipping, optimizer.

    Args:
        logits: of the inputs, [B, classes].
        optimizer: over all that trains, its state loaded; on a GPU with ``fused=True``. Its
            learning rate belongs to the step from now on.
        autocast: makes the context of the forward pass.
        scaler: of the loss, for fp16.
        class_weights: [classes], of the loss.
        label_smoothing: share of the target that is spread over all classes.
        clip_grad: largest norm of the gradient.
        graph: on a GPU, replay a CUDA graph (:class:`fastadapt.GraphedStep`), unless the loss is
            scaled. The graph's memory is freed with the function.
        say: as for :class:`fastadapt.GraphedStep`.

    Returns:
        ``step(lr, labels, *inputs)``, which gives the loss and the number of right predictions,
        both on the device; it never waits for a GPU.
    """
    groups = optimizer.param_groups
    trained = [p for group in groups for p in group["params"]]
    device = trained[0].device
    # Read by the optimizer's kernel, as fp32: a number would be part of the graph.
    rate = torch.zeros((), dtype=torch.float32, device=device) if device.type == "cuda" else None
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)

    def train(labels: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            y = logits(*inputs)
        loss = F.cross_entropy(y.float(), labels, class_weights, label_smoothing=label_smoothing)
        # In this thread: a thread of autograd's would have a workspace of cuBLAS of its own.
        with torch.autograd.set_multithreading_enabled(False):
            scaler.scale(loss).backward()
        if clip_grad is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, clip_grad)
        for group in groups:
            # Fused optimizers always are. PyTorch warns if this is set where nothing is captured.
            if "capturable" in group and rate is not None:
                group["capturable"] = torch.cuda.is_current_stream_capturing()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), (y.detach().argmax(1) == labels).sum()

    run: Callable[..., Any] = train
    if graph and not scaler.is_enabled():
        run = GraphedStep(train, say=say)

    def step(lr: float, labels: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        if rate is not None:
            rate.fill_(lr)
        for group in groups:
            group["lr"] = lr if rate is None else rate
        return run(labels, *inputs)

    return step


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
