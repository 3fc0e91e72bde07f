"""The features before a model's head, as its output or beside its classes.

For images x, with the methods that :class:`fastadapt.AdaptedModel` and timm's models have alike:

1. features = forward_head(forward_features(x), pre_logits=True)  [B, dim]
2. logits = head(features)                                        [B, classes]

A run that was trained with ``tta`` shows every image from V sides: (1) is computed for each, and
features are their mean. Its head is linear, so that (2) of the mean is the mean of the logits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.errors import InputError
from fastadapt.symmetries import mean_over_views, symmetric_views
from fastadapt.train.shared_backbone import SharedBackbone

from .precision.half import MixedPrecision

OUTPUT = "features"  # the name of the second output


def check_features(model: nn.Module, name: object) -> None:
    """Raise InputError if a model has no features before its head, as GDPL's have none.

    Args:
        model: an adapted model, or timm's.
        name: of the model, for the message.
    """
    if isinstance(model, SharedBackbone):
        raise InputError(
            f"{name} is an ensemble, whose models have features of their own: take one of its run "
            "folders"
        )
    if not hasattr(model, "forward_head") or not hasattr(model, "forward_features"):
        raise InputError(
            f"{name} is a GDPL model, whose features are those of its class names, too: embed "
            "with its backbone, or predict with --logits"
        )


class Features(nn.Module):
    """Map images to the features before the head [B, dim].

    Args:
        model: an adapted model, timm's, or either in half precision.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        """Compute fp32 features."""
        return compute_features(self.model, images)[1]


class WithFeatures(nn.Module):
    """Map images to logits [B, classes] and to the features before the head [B, dim].

    Args:
        model: as for :class:`Features`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        self.num_classes = getattr(model, "num_classes", 0)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both, in fp32, in one pass."""
        return compute_features(self.model, images, head=True)


def compute_features(model: Any, images: Tensor, head: bool = False) -> tuple[Tensor, Tensor]:
    """Return logits (features again without ``head``) and features of one pass.

    In half precision (:class:`fastadapt.export.precision.half.MixedPrecision`) images are cast to
    the model's dtype, and outputs to fp32.
    """
    inner = model
    if isinstance(model, MixedPrecision):
        inner, images = model.model, images.to(model.dtype)
    own, count = isinstance(inner, AdaptedModel), images.shape[0]
    tta = inner.config.tta if own else "none"
    tokens = inner.forward_features(images if tta == "none" else symmetric_views(images, tta))
    features = logits = inner.forward_head(tokens, pre_logits=True)
    if tta != "none":
        features = logits = mean_over_views(features, count)
    if head:  # timm's heads differ in what they do after the features
        logits = inner.head(features) if own else inner.forward_head(tokens)
    return logits.flatten(1).float(), features.flatten(1).float()
