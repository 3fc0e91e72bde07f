"""Make the optimizer of an adapted model: what decays, and how fast each layer learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.adapted_model import AdaptedModel
from fastadapt.errors import InputError
from fastadapt.train.config import TrainConfig
from fastadapt.trainable import uncompiled


def make_optimizer(model: AdaptedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer of everything that requires gradients; on a GPU in one kernel a group.

    Weight decay is that of matrices, or of all parameters (``decay``). With ``layer_decay`` γ the
    backbone's block i of L learns γ^(L − i + 1) times as fast as adapter and head, its stem
    γ^(L + 1) times: the groups' ``lr_scale``, which :func:`fastadapt.train.step.training_step`
    reads.

    Raises:
        InputError: the backbone's layers are not known, as ``layer_decay`` needs them.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    if config.layer_decay < 1:
        groups = _backbone_groups(model, config)
        grouped = {id(p) for group in groups for p in group["params"]}
        trained = [p for p in trained if id(p) not in grouped]
    groups += [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if config.decay == "all":
        for group in groups:
            group["weight_decay"] = config.weight_decay
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    on_gpu = next(model.parameters()).is_cuda
    return kind(groups, lr=config.lr, fused=True if on_gpu else None)


def _backbone_groups(model: AdaptedModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Return timm's groups of the backbone's parameters that train, each with its ``lr_scale``."""
    from timm.optim import param_groups_layer_decay

    backbone = uncompiled(model.backbone)
    if not hasattr(backbone, "group_matcher"):
        raise InputError(
            f"layer_decay is {config.layer_decay}, but the layers of {type(backbone).__name__} are "
            "not known: leave `layer_decay` out"
        )
    groups = param_groups_layer_decay(
        backbone, weight_decay=config.weight_decay, layer_decay=config.layer_decay
    )
    # timm's last layer is the classifier, ours is after it: adapter and head.
    return [{**group, "lr_scale": group["lr_scale"] * config.layer_decay} for group in groups]


def copy_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors, on their device, where further training leaves them alone."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
