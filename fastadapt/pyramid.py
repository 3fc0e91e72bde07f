"""Put the maps of a convolutional backbone's resolutions beside each other, on the last one's grid.

The last map of a classifier is what its own classes need; textures, edges and small marks are in
the maps before it. With maps m_i [B, C_i, H_i, W_i], i = 1 … L, the last of each resolution from
stride 4 on:

    (1) p_i = the means of m_i over the cells of the last map's grid     [B, C_i, H_L, W_L]
    (2) f   = LayerNorm over the channels of each p_i, without weights, side by side
                                                                         [B, ΣC_i, H_L, W_L]

A mean does not tell a flat cell from one with an edge or a grain in it; deviations do:

    (3) d_i = √max(means of m_i² − p_i², ε), i < L                       [B, C_i, H_L, W_L]
    (4) f'  = f, and LayerNorm over the channels of each d_i, side by side

The layers after the last block (EfficientNet's last convolution, say) are not used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIRST_STRIDE = 4  # a map of half the image's size is edges alone
LEAST_VARIANCE = 1e-6  # below it a root has no useful gradient


def pyramid_levels(backbone: nn.Module) -> list[int]:
    """Return which of timm's intermediate maps are the last of a resolution; empty without any.

    Vision transformers have one resolution, so none.
    """
    info: Any = getattr(backbone, "feature_info", None)
    if info is None or not hasattr(backbone, "forward_intermediates"):
        return []
    strides = [level["reduction"] for level in info]
    last = {stride: index for index, stride in enumerate(strides) if stride >= FIRST_STRIDE}
    return sorted(last.values()) if len(last) > 1 else []


def pyramid_features(backbone: Any, x: Tensor) -> Tensor:
    """Return the maps of all resolutions side by side, [B, ΣC_i, H_L, W_L].

    Args:
        backbone: of timm, with :func:`pyramid_levels`.
        x: images [B, 3, H, W].
    """
    return torch.cat([_normalised(mean) for _, mean, _ in _levels(backbone, x)], 1)


def pyramid_deviations(backbone: Any, x: Tensor) -> Tensor:
    """Return what :func:`pyramid_features` does, and the deviations within the cells after it.

    Args:
        backbone: of timm, with :func:`pyramid_levels`.
        x: images [B, 3, H, W].

    Returns:
        [B, 2 ΣC_i − C_L, H_L, W_L].
    """
    means, deviations = [], []
    for level, mean, sizes in _levels(backbone, x):
        means.append(_normalised(mean))
        if sizes:
            # Squares exceed half precision, and their difference needs more digits than it has.
            level, mean = level.float(), to_grid(level.float(), sizes)
            variance = to_grid(level * level, sizes) - mean * mean
            deviation = _normalised(variance.clamp(min=LEAST_VARIANCE).sqrt())
            deviations.append(deviation.to(means[-1].dtype))
    return torch.cat(means + deviations, 1)


PYRAMIDS = {"pyramid": pyramid_features, "pyramid-deviations": pyramid_deviations}  # by name


def _levels(backbone: Any, x: Tensor) -> list[tuple[Tensor, Tensor, list[torch.Size]]]:
    """Return each level's map, its means over the cells, and the sizes of the coarser maps."""
    found = backbone.forward_intermediates(
        x, indices=pyramid_levels(backbone), output_fmt="NCHW", intermediates_only=True
    )
    sizes = [level.shape[-2:] for level in found]
    return [(m, to_grid(m, sizes[i + 1 :]), sizes[i + 1 :]) for i, m in enumerate(found)]


def to_grid(x: Tensor, sizes: list[torch.Size]) -> Tensor:
    """Average a map [B, C, H, W] over the cells of coarser ones, one after the other."""
    for size in sizes:
        steps = [_halving(old, new) for old, new in zip(x.shape[-2:], size, strict=True)]
        if None in steps:
            x = F.adaptive_avg_pool2d(x, (size[0], size[1]))
            continue
        kernel, stride, padding = zip(*steps, strict=True)  # type: ignore[arg-type]
        x = F.avg_pool2d(x, kernel, stride, padding, count_include_pad=False)
    return x


def _halving(old: int, new: int) -> tuple[int, int, int] | None:
    """Return kernel, stride and padding that take a length to about its half, as strides do."""
    if new == old:
        return 1, 1, 0
    if 2 * new == old:
        return 2, 2, 0
    if 2 * new == old + 1:
        return (3, 2, 1) if old > 1 else (1, 1, 0)
    return (3, 2, 0) if 2 * new == old - 1 else None


def _normalised(x: Tensor) -> Tensor:
    y = x.movedim(1, -1)
    return F.layer_norm(y, y.shape[-1:]).movedim(-1, 1)
