"""Compute a stage's logits for validation and test, captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from fastadapt.cuda_graph import LEAST_STEPS, GraphedStep
from fastadapt.train.config import TrainConfig
from fastadapt.train.halving import InParts


class Evaluations:
    """Keep the step of the present stage, which sees batches of one size.

    Args:
        config: of the run.
        autocast: makes the context that the model runs in.
        say: as for :class:`fastadapt.GraphedStep`.
    """

    def __init__(
        self,
        config: TrainConfig,
        autocast: Callable[[], AbstractContextManager],
        say: Callable[[str], object],
    ):
        self._config, self._autocast, self._say = config, autocast, say
        self._of: tuple[int, bool] | None = None
        self._step: Callable[..., Tensor]

    def step(
        self, stage: int, images: bool, logits: Callable[[Tensor], Tensor], batches: int
    ) -> Callable[..., Tensor]:
        """Return what gives the logits fp32 of a batch, to be called without gradients.

        Args:
            stage, images: the stage, and whether inputs are images rather than features; with a
                new pair the other's graph, and its memory, go.
            logits: of inputs on the device.
            batches: of one validation.
        """
        if (stage, images) != self._of:

            def forward(inputs: Tensor) -> Tensor:
                with self._autocast():
                    return logits(inputs).float()

            epochs, _, _ = self._config.of_stage(stage)
            graph = self._config.cuda_graph == "auto" and epochs * batches >= LEAST_STEPS
            graphed = GraphedStep(forward, say=self._say, what="validation")
            self._of = stage, images
            self._step = InParts(graphed if graph else forward, self._say)
        return self._step
