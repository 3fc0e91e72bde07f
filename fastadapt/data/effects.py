"""Blur images and erase rectangles of them, in batches, each image by its own numbers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)


def blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Convolve each image with a Gaussian of its own.

    Args:
        images: [B, C, H, W], floating point.
        sigma: [B], standard deviations in pixels, at most ``largest``; 0 leaves an image as it is.
        largest: decides the kernel's size, 4 standard deviations to either side at most.

    Returns:
        [B, C, H, W]; the border is reflected.
    """
    count, channels, height, width = images.shape
    radius = min(math.ceil(3 * largest), height - 1, width - 1)
    if radius < 1:
        return images
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    # A tiny standard deviation is a kernel of 1 in the middle.
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = images.reshape(1, count * channels, height, width)
    for shape, padding in (((1, -1), (radius, radius, 0, 0)), ((-1, 1), (0, 0, radius, radius))):
        kernel = weights.view(count * channels, 1, *shape)
        flat = F.conv2d(F.pad(flat, padding, "reflect"), kernel, groups=count * channels)
    return flat.view_as(images)


def erase(images: Tensor, draws: Tensor, used: Tensor) -> Tensor:
    """Fill a random rectangle of some images with their mean colour.

    Args:
        images: [B, C, H, W], floating point.
        draws: [B, 4] in [0, 1): area, aspect, and the place from left and top.
        used: [B] bool, which images lose a rectangle.

    Returns:
        [B, C, H, W].

    Source: random erasing (Zhong et al. 2017), with timm's ranges of area and aspect.
    """
    _, _, height, width = images.shape
    area, aspect, left, top = draws.unbind(1)
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area)
    low, high = (math.log(value) for value in ERASED_ASPECT)
    aspect = torch.exp(low + (high - low) * aspect)
    tall = torch.sqrt(area / aspect).clamp(max=height)
    wide = torch.sqrt(area * aspect).clamp(max=width)
    top, left = top * (height - tall), left * (width - wide)
    y = torch.arange(height, device=images.device, dtype=draws.dtype) + 0.5
    x = torch.arange(width, device=images.device, dtype=draws.dtype) + 0.5
    inside_y = (y >= top[:, None]) & (y < (top + tall)[:, None])
    inside_x = (x >= left[:, None]) & (x < (left + wide)[:, None])
    mask = inside_y[:, None, :, None] & inside_x[:, None, None, :] & used[:, None, None, None]
    return torch.where(mask, images.mean((2, 3), keepdim=True), images)
