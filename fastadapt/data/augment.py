"""Draw random views of images in batches, on the device where the images are.

Each view is a function of a seed, the image's place in its split and the view's number, and of
nothing else: the order of the images, the size of the batches and an interruption change nothing.

For an output pixel at (x, y) in [-1, 1]², the pixel of the stored image is

    (1)  p = S (x, y) + t                 the crop: half its size, its center
    (2)  q = A⁻¹ R(angle) A p · scale + d  rotation, scale and shift, A the image's aspect
    (3)  flips negate x or y, the transposition exchanges them

read bilinearly, from an image halved so often that no pixel between two read ones is lost; beyond
the border the image is reflected. Without (1) and (2) pixels are moved and keep their values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.data.preprocess import Preprocess
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError

LARGEST_STORE = 4.0  # times the backbone's input: how large images are kept for crops
_DRAWS = 14  # random numbers of a view


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for a view. Everything is off by default.

    Attributes:
        flips: left-right and up-down, each for half of the views.
        transpose: rows and columns exchanged, for half of the views.
        crop_area: share of the image's area that a crop keeps, from and to.
        crop_aspect: a crop's width over its height, from and to.
        rotation: largest angle, in degrees, to either side.
        shift: largest shift, as a share of the image's sides, to either side.
        scale: largest magnification and reduction: between 1 - scale and 1 + scale.
        affine_probability: share of the views that are rotated, shifted and scaled.
        brightness: largest change, as a share of the full range.
        contrast: largest change of the factor 1 that values are multiplied by.
    """

    flips: bool = False
    transpose: bool = False
    crop_area: tuple[float, float] | None = None
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    rotation: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    affine_probability: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether pixels are read between pixels: crops, rotation, shift, scale."""
        return self.crop_area is not None or any((self.rotation, self.shift, self.scale))

    def stored(self, plain: Geometry) -> Geometry:
        """Return how images are kept for these views: the plain view, or larger and whole."""
        if self.crop_area is None:
            return plain
        factor = min(1 / math.sqrt(self.crop_area[0]), LARGEST_STORE)
        height, width = round(plain.height * factor), round(plain.width * factor)
        return Geometry(height, width, plain.interpolation)

    def apply(self, images: Tensor, draws: Tensor, plain: Geometry) -> Tensor:
        """Return the views of a batch.

        Args:
            images: [B, 3, H, W] uint8, as :meth:`stored` says.
            draws: [B, 14] in [0, 1), fp32, on the device of the images (:func:`draw`).
            plain: height and width of the views.

        Returns:
            [B, 3, height, width]: uint8 where pixels are only moved, else fp32 from 0 to 255.
        """
        if self.moves:
            images = self._sample(images, draws, plain)
        else:
            if self.flips:
                images = torch.where(_mask(draws[:, 0] < 0.5), images.flip(3), images)
                images = torch.where(_mask(draws[:, 1] < 0.5), images.flip(2), images)
            if self.transpose:
                images = torch.where(_mask(draws[:, 2] < 0.5), images.transpose(2, 3), images)
        if self.brightness or self.contrast:
            factor = 1 + self.contrast * _signed(draws[:, 12])
            offset = 255 * self.brightness * _signed(draws[:, 13])
            images = images.float() * _mask(factor) + _mask(offset)
            images = images.clamp(0, 255)
        return images

    def _sample(self, images: Tensor, draws: Tensor, plain: Geometry) -> Tensor:
        """Read the stored images where equations (1) to (3) say."""
        height, width = images.shape[2:]
        matrix = self._matrix(draws, width / height)
        grid = F.affine_grid(matrix, [len(images), 3, plain.height, plain.width], False)
        # How many stored pixels lie between two neighbours of the view, along either side.
        along_x = torch.hypot(matrix[:, 0, 0] * width, matrix[:, 1, 0] * height) / plain.width
        along_y = torch.hypot(matrix[:, 0, 1] * width, matrix[:, 1, 1] * height) / plain.height
        steps = torch.maximum(along_x, along_y)
        level = steps.clamp(min=1).log2().floor()
        levels = 1 + math.floor(math.log2(max(1.0, self._largest_step(images, plain))))
        pixels = images.float()
        views = F.grid_sample(pixels, grid, "bilinear", "reflection", align_corners=False)
        for number in range(1, levels):
            pixels = F.avg_pool2d(pixels, 2, ceil_mode=True, count_include_pad=False)
            read = F.grid_sample(pixels, grid, "bilinear", "reflection", align_corners=False)
            views = torch.where(_mask(level >= number), read, views)
        return views

    def _largest_step(self, images: Tensor, plain: Geometry) -> float:
        step = max(images.shape[2] / plain.height, images.shape[3] / plain.width)
        return step * (1 + self.scale) * (math.sqrt(2) if self.rotation else 1)

    def _matrix(self, draws: Tensor, aspect: float) -> Tensor:
        """Return [B, 2, 3], from places in the view to places in the stored image."""
        zero, one = torch.zeros_like(draws[:, 0]), torch.ones_like(draws[:, 0])
        half_w, half_h, center_x, center_y = one, one, zero, zero
        if self.crop_area is not None:
            low, high = self.crop_area
            area = low + (high - low) * draws[:, 3]
            shapes = [math.log(a) for a in self.crop_aspect]
            shape = torch.exp(shapes[0] + (shapes[1] - shapes[0]) * draws[:, 4])
            half_w = torch.sqrt(area * shape).clamp(max=1)
            half_h = torch.sqrt(area / shape).clamp(max=1)
            center_x = (1 - half_w) * _signed(draws[:, 5])
            center_y = (1 - half_h) * _signed(draws[:, 6])
        matrix = torch.stack(
            [
                torch.stack([half_w, zero, center_x], 1),
                torch.stack([zero, half_h, center_y], 1),
                torch.stack([zero, zero, one], 1),
            ],
            1,
        )
        if any((self.rotation, self.shift, self.scale)):
            used = (draws[:, 7] < self.affine_probability).to(draws.dtype)
            angle = used * math.radians(self.rotation) * _signed(draws[:, 8])
            zoom = 1 / (1 + used * self.scale * _signed(draws[:, 9]))
            cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
            shift_x = 2 * used * self.shift * _signed(draws[:, 10])
            shift_y = 2 * used * self.shift * _signed(draws[:, 11])
            turn = torch.stack(
                [
                    torch.stack([cos, -sin / aspect, shift_x], 1),
                    torch.stack([sin * aspect, cos, shift_y], 1),
                    torch.stack([zero, zero, one], 1),
                ],
                1,
            )
            matrix = turn @ matrix
        if self.flips:
            signs = torch.where(draws[:, :2] < 0.5, -1.0, 1.0)
            matrix = matrix * torch.cat([signs, one[:, None]], 1)[:, None]
        if self.transpose:
            matrix = torch.where(_mask(draws[:, 2] < 0.5, 3), matrix[:, :, [1, 0, 2]], matrix)
        return matrix[:, :2]


AUGMENTATIONS = {
    "none": Augmentation(),
    "flips": Augmentation(flips=True),
    "dihedral": Augmentation(flips=True, transpose=True),
    # Half of the area at least: ImageNet's 0.08 would often cut a small defect away.
    "crops": Augmentation(flips=True, crop_area=(0.5, 1.0)),
}
AUGMENTS = tuple(AUGMENTATIONS)


def draw(seed: int, view: int, count: int) -> np.ndarray:
    """Return the random numbers of one view of each of ``count`` images, [count, 14] fp32."""
    return np.random.default_rng((seed, view)).random((count, _DRAWS), dtype=np.float32)


def check_augment(augment: str, preprocess: Preprocess) -> None:
    """Refuse an augmentation that is not known, or that the image size rules out.

    Raises:
        InputError: it is none of ``AUGMENTS``, or needs square images.
    """
    if augment not in AUGMENTATIONS:
        raise InputError(f"augment is {augment!r}; expected one of {', '.join(AUGMENTS)}")
    _, height, width = preprocess.input_size
    if AUGMENTATIONS[augment].transpose and height != width:
        raise InputError(f"augment {augment!r} needs square images; these are {height}×{width}")


def _mask(values: Tensor, dims: int = 4) -> Tensor:
    return values.view(-1, *(1,) * (dims - 1))


def _signed(uniform: Tensor) -> Tensor:
    """Map [0, 1) to [-1, 1)."""
    return 2 * uniform - 1
