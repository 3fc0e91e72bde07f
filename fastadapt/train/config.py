"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastadapt.data.augment import AUGMENTS
from fastadapt.errors import InputError
from fastadapt.train.sources import FEATURE_DTYPES

CHOICES = {
    "optimizer": ("adamw", "adam"),
    "class_weights": ("none", "balanced"),
    "amp": ("auto", "off", "bf16", "fp16"),
    "cuda_graph": ("auto", "off"),
    "select": ("macro_f1", "accuracy", "loss"),
    "augment": AUGMENTS,
    "feature_dtype": FEATURE_DTYPES,
}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Two runs with equal settings, data and device kind give equal weights on CPU.

    Attributes:
        stages: 1 trains what was added to the frozen backbone; 2 then continues from the best of
            that with everything trainable.
        epochs, lr, batch_size: of stage 1; ``lr`` is the peak learning rate.
        epochs2, lr2, batch_size2: of stage 2; ``batch_size2`` is ``batch_size`` if ``None``.
        optimizer: ``"adamw"`` or ``"adam"``.
        weight_decay: of matrices; biases, norms and other vectors have none.
        warmup_epochs: of linear warm-up in each stage; a cosine to 0 follows. Per step.
        clip_grad: largest norm of the gradient; ``None`` for no limit.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: ``"balanced"`` weights the loss by the inverse of a class's frequency.
        amp: mixed precision. ``"auto"``: on a GPU bf16, or fp16 where it has no bf16; else off.
        cuda_graph: ``"auto"``: on a GPU, where a stage has 20 full batches and more, capture a step
            and replay it (:class:`fastadapt.GraphedStep`), but for fp16, whose loss is scaled.
            ``"off"`` is for models whose Python code does something else in every step. A run may
            be resumed with the other setting.
        select: which validation metric decides the epoch that is kept; the earlier one if equal.
        patience: epochs without improvement after which a stage ends; ``None`` for no limit.
        augment: random views (:mod:`fastadapt.data.augment`): of the cached ones in stage 1, fresh
            ones in stage 2 and where nothing is cached.
        views: cached views of each training image, the plain one first.
        cache: compute the frozen backbone's features once, and keep them on disk.
        feature_dtype: of the cache; ``"auto"`` is fp16 unless a value exceeds its range.
        val_fraction: share of each class for validation, where the data gives no val split.
        seed: of everything random.
    """

    stages: int = 1
    epochs: int = 30
    lr: float = 1e-3
    batch_size: int = 32
    epochs2: int = 10
    lr2: float = 1e-5
    batch_size2: int | None = None
    optimizer: Literal["adamw", "adam"] = "adamw"
    weight_decay: float = 0.01
    warmup_epochs: float = 1.0
    clip_grad: float | None = None
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    cuda_graph: Literal["auto", "off"] = "auto"
    select: Literal["macro_f1", "accuracy", "loss"] = "macro_f1"
    patience: int | None = None
    augment: Literal["none", "flips", "dihedral", "crops"] = "none"
    views: int = 1
    cache: bool = True
    feature_dtype: Literal["auto", "fp16", "fp32"] = "auto"
    val_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}"
                )
        if self.stages not in (1, 2):
            raise InputError(f"stages is {self.stages}; expected 1 or 2")
        for name in ("epochs", "epochs2", "batch_size", "batch_size2", "patience", "views"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("lr", "lr2", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value}; expected more than 0")
        for name in ("weight_decay", "warmup_epochs", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(
                f"label_smoothing is {self.label_smoothing}; expected 0 or more, less than 1"
            )
        if self.views > 1 and self.augment == "none":
            raise InputError(
                f"views is {self.views}, but augment is 'none', so all views would be the same: "
                "give --augment flips, dihedral or crops"
            )

    def of_stage(self, stage: int) -> tuple[int, float, int]:
        """(epochs, peak learning rate, batch size) of a stage."""
        if stage == 1:
            return self.epochs, self.lr, self.batch_size
        return self.epochs2, self.lr2, self.batch_size2 or self.batch_size
