"""Keep an exponential moving average of the weights that train.

    a ← d_n a + (1 − d_n) w,    d_n = min(d, (1 + n) / (10 + n))

after step n, so that a short run is not an average over its start. Running statistics of batch
norms are those of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """The average of a model's parameters that require gradients now.

    Args:
        model: on its device.
        decay: d.
        tensors: the average so far, by name; that of the present weights if empty.
    """

    def __init__(self, model: nn.Module, decay: float, tensors: dict[str, Tensor] | None = None):
        self._decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        start = {name: p.detach() for name, p in trained.items()} | (tensors or {})
        self._names = list(trained)
        self._weights = [p.detach() for p in trained.values()]
        self._average = [start[name].to(p.device, copy=True) for name, p in trained.items()]

    def update(self, step: int) -> None:
        """Take the weights after a step in; it never waits for a GPU.

        Args:
            step: from 1, over all epochs of the stage.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._average, self._weights, step)

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of the average, by the parameters' names."""
        return {
            name: tensor.clone() for name, tensor in zip(self._names, self._average, strict=True)
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the average, in place, and its own weights back afterwards."""
        own = [weight.clone() for weight in self._weights]
        self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, tensors: list[Tensor]) -> None:
        for weight, tensor in zip(self._weights, tensors, strict=True):
            weight.copy_(tensor)
