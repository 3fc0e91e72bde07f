"""Take a batch that does not fit into the GPU's memory in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError

Full = Callable[[int], object]  # called with the number of parts, before they are tried


def halving(model: nn.Module, option: str, say: Callable[[str], object]) -> Full:
    """Return what says that training takes batches in parts, or refuses it.

    Args:
        model: in training mode when it is called.
        option: of the size of a batch.
        say: is called with a line.
    """

    def full(parts: int) -> None:
        trains = nn.modules.batchnorm._BatchNorm
        if any(isinstance(module, trains) and module.training for module in model.modules()):
            raise InputError(
                "the GPU's memory is full, and batch norms that train need whole batches: start "
                f"anew with a smaller `{option}`"
            )
        say(
            f"a batch does not fit into the GPU's memory: its gradients are added up over {parts} "
            "parts, which changes nothing but rounding"
        )

    return full


class InParts:
    """Call a function of independent samples on as many parts of a batch as memory demands.

    Args:
        function: of a batch [B, …], gives [B, …].
        say: is called with a line when parts get smaller.
    """

    def __init__(self, function: Callable[..., Any], say: Callable[[str], object]):
        self._function, self._say = function, say
        self._parts = 1

    def __call__(self, batch: Tensor) -> Tensor:
        """Return the function's result.

        Raises:
            torch.OutOfMemoryError: a single sample does not fit.
        """
        while True:
            try:
                if self._parts == 1:
                    return self._function(batch)
                return torch.cat([self._function(part) for part in batch.chunk(self._parts)])
            except torch.OutOfMemoryError:
                if self._parts >= len(batch):
                    raise
            # After the handler, whose error holds what the failed call had made.
            self._parts *= 2
            free_memory()
            self._say(f"a batch does not fit into the GPU's memory: {self._parts} parts are tried")


def free_memory() -> None:
    """Give back what a failed call has left in PyTorch's pools."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
