"""Calibrate probabilities by one temperature (Guo et al. 2017, section 4.2).

The model's logits z [N, K] are divided by T > 0, which changes no prediction:

    (1)  p = softmax(z / T)
    (2)  T = argmin -1/N Σ_n log p[n, label_n],  over the validation images
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.errors import counted

# Where every validation image is right, (2) falls towards T = 0 without an end.
LOWEST, HIGHEST = 0.05, 20.0
FEWEST = 20  # images: fewer say too little of how sure a model may be


def calibrate(logits: Tensor, labels: np.ndarray) -> tuple[float, str]:
    """Return the temperature to use, and why it is kept at 1, where (2) cannot be trusted.

    Args:
        logits: [N, K] of validation images.
        labels: [N].
    """
    if not logits.isfinite().all():
        return 1.0, "the model's outputs hold NaN or infinite values"
    if len(labels) < FEWEST:
        return 1.0, f"validation has {counted(len(labels), 'image')}, and {FEWEST} are needed"
    temperature = fit_temperature(logits, labels)
    if temperature < 1 and bool((logits.argmax(1).numpy() == labels).all()):
        return 1.0, "every validation image is right, so that nothing bounds the temperature"
    if temperature in (LOWEST, HIGHEST):
        return 1.0, f"the best temperature is out of range ({LOWEST:g} to {HIGHEST:g})"
    return temperature, ""


def fit_temperature(logits: Tensor, labels: np.ndarray) -> float:
    """Return the temperature of (2), between ``LOWEST`` and ``HIGHEST``.

    Args:
        logits: [N, K] of validation images.
        labels: [N].

    Returns:
        1 where logits are not finite.
    """
    z, target = logits.detach().double().clone(), torch.from_numpy(labels)
    if not z.isfinite().all():
        return 1.0
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(z / log_temperature.exp(), target)
        value.backward()
        return value

    optimizer.step(loss)
    temperature = float(log_temperature.detach().exp())
    return float(np.clip(temperature, LOWEST, HIGHEST))
