"""Resize and crop batches on a GPU as Pillow does one image, by two matrix products.

For an image X [H, W] of one colour and the crop's h × w pixels::

    (1)  Y = X Aᵀ              A [w, W]: the weights of the columns    each clipped to 0 … 255,
    (2)  Z = B Y               B [h, H]: those of the rows             and Z rounded

Row i of A holds k((x + ½ − c) / s) for the columns x, divided by their sum; c = (i + ½) W / W' is
where the i-th pixel of W' lies, s = max(W / W', 1) and k the filter. Rows of pixels that the crop
leaves out are not computed. Tensor cores take values in fp16, in which those of 8 bits are exact,
and sum in fp32. Pillow rounds Y, too, and some of its releases begin with (2) where that is less
work: where colours are smooth, values differ by 1 at most.

Source: Pillow, ``precompute_coeffs`` in ``Resample.c``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastadapt.data.resize import Geometry, resized_size

KEPT = 64  # matrices, for as many sizes of images


class Resizer:
    """Do what :meth:`Geometry.apply` does with one image, with batches of one size.

    Args:
        geometry: what is done; its filter is one of :data:`fastadapt.data.decode_on.FILTERS`.
    """

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self._kept: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return uint8 [B, 3, geometry.height, geometry.width] of uint8 [B, 3, H, W]."""
        geometry, (height, width) = self.geometry, images.shape[2:]
        to_width, to_height = resized_size((width, height), geometry.target, geometry.crop_mode)
        pixels = images.to(torch.float16 if images.is_cuda else torch.float32)
        if to_width != width or to_width > geometry.width:
            weights = self._weights(width, to_width, geometry.width, pixels)
            pixels = (pixels @ weights.T).clamp_(0, 255)
        if to_height != height or to_height > geometry.height:
            weights = self._weights(height, to_height, geometry.height, pixels)
            pixels = weights @ pixels
        # Halves are rounded up, as Pillow does.
        return self._with_border(pixels.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8))

    def _weights(self, size: int, resized: int, crop: int, like: Tensor) -> Tensor:
        """Return the weights of each pixel of a side in each of the resized and cropped side.

        Returns:
            [min(crop, resized), size], of the type and on the device of ``like``.
        """
        key = (size, resized, crop)
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            first = round((resized - crop) / 2.0) if resized > crop else 0
            pixels = torch.arange(first, first + min(crop, resized), device=like.device)
            scale = size / resized
            centers = (pixels.double() + 0.5) * scale
            places = torch.arange(size, device=like.device).double() + 0.5
            apart = (places - centers[:, None]).abs_().div_(max(scale, 1.0))
            weights = _FILTERS[self.geometry.interpolation](apart)
            self._kept[key] = weights.div_(weights.sum(1, keepdim=True)).to(like.dtype)
        return self._kept[key]

    def _with_border(self, images: Tensor) -> Tensor:
        """Add borders around images that are smaller than the crop."""
        geometry = self.geometry
        x, y = geometry.width - images.shape[3], geometry.height - images.shape[2]
        if not (x or y):
            return images
        border = (x // 2, (x + 1) // 2, y // 2, (y + 1) // 2)
        fill = geometry.fill if geometry.crop_mode == "border" else (0, 0, 0)
        planes = zip(images.unbind(1), fill, strict=True)
        return torch.stack([pad(plane, border, value=value) for plane, value in planes], dim=1)


def _bilinear(apart: Tensor) -> Tensor:
    return (1 - apart).clamp_(min=0)


def _bicubic(apart: Tensor) -> Tensor:
    near = (1.5 * apart - 2.5) * apart * apart + 1
    far = ((-0.5 * apart + 2.5) * apart - 4) * apart + 2
    return torch.where(apart < 1, near, torch.where(apart < 2, far, 0.0))


_FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic}
