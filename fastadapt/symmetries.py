"""Show an image from several sides, to average what a model says of it (test-time augmentation)."""

from __future__ import annotations

import torch
from torch import Tensor

SYMMETRIES = ("none", "flips", "dihedral")


def symmetric_views(images: Tensor, which: str) -> Tensor:
    """Return an image's symmetric views, the image itself first.

    Args:
        images: [B, C, H, W].
        which: ``"flips"``: the image, left-right, up-down and both (V = 4); ``"dihedral"``: these
            and their transposes (V = 8), of square images.

    Returns:
        [V·B, C, H, W], view after view.
    """
    views = [images, images.flip(3), images.flip(2), images.flip(2, 3)]
    if which == "dihedral":
        views += [view.transpose(2, 3) for view in views]
    return torch.cat(views)


def mean_over_views(outputs: Tensor, images: int) -> Tensor:
    """Average outputs [V·B, K] of :func:`symmetric_views` of B images; returns [B, K]."""
    return outputs.reshape(-1, images, outputs.shape[-1]).mean(0)
