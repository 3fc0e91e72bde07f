"""Compute the learning rate of each step.

With the peak η, steps t = 1 … T in all of E epochs, W of them warm-up, I = T / E steps an epoch:

    (1) cosine:   η t / W                                      t ≤ W
                  η (1 + cos(π (t − 1 − W) / (T − W))) / 2     t > W
    (2) CLAdapter: η (0.01 (1 − a) + a),  a = (t − 1) / W      t ≤ W
                  η (1 + cos(π (t − 1) / (T + I))) / 2         t > W
    (3) GDPL, in epochs e = 1 … E, V of them warm-up:
                  1e-5                                         e ≤ V
                  η (1 + cos(π (e − 1 − V) / E)) / 2           e > V

(2) and (3) are the papers' code to the letter. In (2) the cosine has run since the first step, and
to an end one epoch after the last; in (3) it neither begins with the warm-up nor comes to its end.

Source: (2) CLAdapter's ``get_warm_up_lr`` and ``get_train_epoch_lr``, whose ``args.epochs`` is one
more than asked for; (3) dassl's ``ConstantWarmupScheduler`` before ``CosineAnnealingLR``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

WARMUP_START = 0.01  # of the peak, in (2)
WARMUP_RATE = 1e-5  # in (3)


@dataclass(frozen=True)
class Schedule:
    """The learning rates of a stage.

    Attributes:
        kind: ``"cosine"`` (1), ``"cladapter"`` (2) or ``"gdpl"`` (3).
        peak: the highest learning rate.
        epochs: in all.
        steps: of an epoch.
        warmup_epochs: at the beginning; part of an epoch in (1) and (2) only.
    """

    kind: str
    peak: float
    epochs: int
    steps: int
    warmup_epochs: float

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1 over all epochs."""
        return _RATES[self.kind](self, step)

    @property
    def total(self) -> int:
        """Return the number of steps in all."""
        return self.epochs * self.steps

    @property
    def warmup(self) -> int:
        """Return the number of warm-up steps."""
        return min(round(self.warmup_epochs * self.steps), self.total)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear from 0 to ``peak`` at step ``warmup``, then a cosine to 0 at step ``steps``; (1).

    Args:
        step: from 1.
        steps: in all.
        warmup: of these.
        peak: the highest rate.
    """
    if step <= warmup:
        return peak * step / warmup
    # Steps count from 1, so that no step is lost to a learning rate of 0: not even the last.
    return _cosine(peak, (step - 1 - warmup) / max(steps - warmup, 1))


def _cosine(peak: float, done: float) -> float:
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def _of_cosine(plan: Schedule, step: int) -> float:
    return learning_rate(step, plan.total, plan.warmup, plan.peak)


def _of_cladapter(plan: Schedule, step: int) -> float:
    if step <= plan.warmup:
        done = (step - 1) / plan.warmup
        return plan.peak * (WARMUP_START * (1 - done) + done)
    return _cosine(plan.peak, (step - 1) / (plan.total + plan.steps))


def _of_gdpl(plan: Schedule, step: int) -> float:
    epoch = (step - 1) // plan.steps
    if epoch < plan.warmup_epochs:
        return WARMUP_RATE
    return _cosine(plan.peak, (epoch - math.ceil(plan.warmup_epochs)) / plan.epochs)


_RATES: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": _of_cosine,
    "cladapter": _of_cladapter,
    "gdpl": _of_gdpl,
}
