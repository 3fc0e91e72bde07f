"""What a loop over epochs asks of losses, labels and models."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt.data.dataset import Dataset
from fastadapt.errors import InputError
from fastadapt.train.config import TrainConfig
from fastadapt.train.run_folder import STATE, State


def check_finite(loss: float, config: TrainConfig, state: State, where: str) -> None:
    """Refuse a loss that is not finite.

    Args:
        loss: of a step or an epoch.
        config: of the run.
        state: of the run, with the epochs before.
        where: epoch and step.

    Raises:
        InputError: it is NaN or infinite.
    """
    if math.isfinite(loss):
        return
    option = "lr" if state.stage == 1 else "lr2"
    _, peak, _ = config.of_stage(state.stage)
    kept = f"{STATE} keeps the epoch before" if state.history else "no epoch was completed"
    raise InputError(
        f"the loss is {loss} in stage {state.stage}, {where}: start anew with a lower "
        f"`{option}` (it is {peak:g}), with `clip_grad=1`, or with `amp='off'`; {kept}"
    )


def class_weights(labels: np.ndarray, dataset: Dataset, config: TrainConfig) -> Tensor | None:
    """Return weights [num_classes], of mean 1 over the training images' ``labels``, or ``None``."""
    if config.class_weights == "none":
        return None
    counts = torch.bincount(torch.from_numpy(labels), minlength=len(dataset.classes))
    return len(labels) / (len(counts) * counts.float())


def samples_are_independent(model: nn.Module, device: torch.device) -> bool:
    """Whether a step's result for one image does not depend on the others, on a GPU."""
    return device.type == "cuda" and not any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for module in model.modules()
    )
