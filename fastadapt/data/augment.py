"""Draw random views of images in batches, on the device where the images are.

Each view is a function of a seed, the image's place in its split and the view's number, and of
nothing else: the order of the images, the size of the batches and an interruption change nothing.

For an output pixel at (x, y) in [-1, 1]², the pixel of the stored image is

    (1)  p = S (x, y) + t                    the crop: half its size, its center
    (2)  q = A⁻¹ R(angle) A (p + d) / scale   rotation, scale and shift, A the image's aspect
    (3)  flips negate x or y, the transposition exchanges them

read bilinearly, from an image halved so often that no pixel between two read ones is lost; beyond
the border the image is reflected, or black. Without (1) and (2) pixels are moved and keep their
values. Brightness and contrast change the view (with a black border the stored image, so that the
border stays black); blur and erasing come last.

Source: (2) is albumentations' ``ShiftScaleRotate``; brightness and contrast are those of its
``RandomBrightnessContrast`` for bytes; crops are torchvision's ``RandomResizedCrop``.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.data.effects import blur, erase
from fastadapt.data.preprocess import Preprocess
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError

LARGEST_STORE = 4.0  # times the backbone's input: how large images are kept for crops
TRIES = 10  # that a crop which does not fit the image is drawn again, as torchvision does


class Column(IntEnum):
    """Name the random numbers of a view."""

    LEFT_RIGHT = 0
    UP_DOWN = 1
    TRANSPOSE = 2
    CROP_AREA = 3
    CROP_SHAPE = 4
    CROP_X = 5
    CROP_Y = 6
    AFFINE = 7
    ANGLE = 8
    SCALE = 9
    SHIFT_X = 10
    SHIFT_Y = 11
    CONTRAST = 12
    BRIGHTNESS = 13
    COLOR = 14  # these and the following came later: the ones before keep their values
    BLUR = 15
    SIGMA = 16
    ERASE = 17
    ERASED = 18  # to 21: area, aspect, left, top
    CROPS = 22  # and on: area and shape of each further try


FIRST_DRAWS = Column.COLOR
DRAWS = Column.CROPS + 2 * (TRIES - 1)


@dataclass(frozen=True)
class Augmentation:
    """What is drawn for a view. Everything is off by default.

    Attributes:
        flips: left-right and up-down, each for half of the views.
        left_right: left-right flips only, for half of the views.
        transpose: rows and columns exchanged, for half of the views.
        crop_area: share of the image's area that a crop keeps, from and to.
        crop_aspect: a crop's width over its height, from and to.
        crop_tries: how often a crop is drawn that exceeds the image; then it is cut to the image.
        rotation: largest angle, in degrees, to either side.
        shift: largest shift, as a share of the image's sides, to either side.
        scale: largest magnification and reduction: between 1 - scale and 1 + scale.
        affine_probability: share of the views that are rotated, shifted and scaled.
        border: what rotation, shift and scale show beyond the image, ``"reflect"`` or ``"black"``.
        brightness: largest change, as a share of the full range.
        contrast: largest change of the factor 1 that values are multiplied by.
        color_probability: share of the views whose brightness and contrast change.
        blur: largest standard deviation of a Gaussian blur, in pixels of the view.
        blur_probability: share of the views that are blurred.
        erase: share of the views that lose a rectangle.
    """

    flips: bool = False
    left_right: bool = False
    transpose: bool = False
    crop_area: tuple[float, float] | None = None
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    crop_tries: int = 1
    rotation: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    affine_probability: float = 1.0
    border: str = "reflect"
    brightness: float = 0.0
    contrast: float = 0.0
    color_probability: float = 1.0
    blur: float = 0.0
    blur_probability: float = 0.5
    erase: float = 0.0

    @property
    def name(self) -> str:
        """The name of :data:`AUGMENTATIONS` that has the same effect, or all settings."""
        settings = asdict(self)
        if not any((self.rotation, self.shift, self.scale)):
            del settings["affine_probability"], settings["border"]
        if not any((self.brightness, self.contrast)):
            del settings["color_probability"]
        if not self.blur:
            del settings["blur_probability"]
        alike = Augmentation(**settings)
        named = [name for name, known in AUGMENTATIONS.items() if known == alike]
        return named[0] if named else repr(alike)

    @property
    def plain(self) -> bool:
        """Whether nothing is drawn: every view is the plain one."""
        return self.name == "none"

    @property
    def affine(self) -> bool:
        """Whether views are rotated, shifted or scaled."""
        return any((self.rotation, self.shift, self.scale))

    @property
    def moves(self) -> bool:
        """Whether pixels are read between pixels: crops, rotation, shift, scale."""
        return self.crop_area is not None or self.affine

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
            draws: [B, DRAWS] in [0, 1), fp32, on the device of the images (:func:`draw`).
            plain: height and width of the views.

        Returns:
            [B, 3, height, width]: uint8 where pixels are only moved, else fp32 from 0 to 255.
        """
        black = self.moves and self.border == "black"
        if black:
            images = self._color(images, draws)
        if self.moves:
            images = self._sample(images, draws, plain)
        else:
            for column, axis in self._flips():
                images = torch.where(_mask(draws[:, column] < 0.5), images.flip(axis), images)
            if self.transpose:
                turned = images.transpose(2, 3)
                images = torch.where(_mask(draws[:, Column.TRANSPOSE] < 0.5), turned, images)
        if not black:
            images = self._color(images, draws)
        if self.blur:
            used = draws[:, Column.BLUR] < self.blur_probability
            images = blur(images.float(), used * self.blur * draws[:, Column.SIGMA], self.blur)
        if self.erase:
            used = draws[:, Column.ERASE] < self.erase
            box = draws[:, Column.ERASED : Column.ERASED + 4]
            images = erase(images.float(), box, used)
        return images

    def _flips(self) -> list[tuple[Column, int]]:
        """Return which random number decides on which axis of a batch."""
        if self.flips:
            return [(Column.LEFT_RIGHT, 3), (Column.UP_DOWN, 2)]
        return [(Column.LEFT_RIGHT, 3)] if self.left_right else []

    def _color(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change brightness and contrast."""
        if not (self.brightness or self.contrast):
            return images
        used = (draws[:, Column.COLOR] < self.color_probability).to(draws.dtype)
        factor = 1 + used * self.contrast * _signed(draws[:, Column.CONTRAST])
        offset = 255 * used * self.brightness * _signed(draws[:, Column.BRIGHTNESS])
        return (images.float() * _mask(factor) + _mask(offset)).clamp(0, 255)

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
        beyond = "zeros" if self.border == "black" else "reflection"
        views = F.grid_sample(pixels, grid, "bilinear", beyond, align_corners=False)
        for number in range(1, levels):
            pixels = F.avg_pool2d(pixels, 2, ceil_mode=True, count_include_pad=False)
            read = F.grid_sample(pixels, grid, "bilinear", beyond, align_corners=False)
            views = torch.where(_mask(level >= number), read, views)
        return views

    def _largest_step(self, images: Tensor, plain: Geometry) -> float:
        step = max(images.shape[2] / plain.height, images.shape[3] / plain.width)
        return step / (1 - self.scale) * (math.sqrt(2) if self.rotation else 1)

    def _matrix(self, draws: Tensor, aspect: float) -> Tensor:
        """Return [B, 2, 3], from places in the view to places in the stored image."""
        zero, one = torch.zeros_like(draws[:, 0]), torch.ones_like(draws[:, 0])
        half_w, half_h, center_x, center_y = one, one, zero, zero
        if self.crop_area is not None:
            half_w, half_h = self._crop_size(draws, self.crop_area, aspect)
            center_x = (1 - half_w) * _signed(draws[:, Column.CROP_X])
            center_y = (1 - half_h) * _signed(draws[:, Column.CROP_Y])
        matrix = torch.stack(
            [
                torch.stack([half_w, zero, center_x], 1),
                torch.stack([zero, half_h, center_y], 1),
                torch.stack([zero, zero, one], 1),
            ],
            1,
        )
        if self.affine:
            used = (draws[:, Column.AFFINE] < self.affine_probability).to(draws.dtype)
            angle = used * math.radians(self.rotation) * _signed(draws[:, Column.ANGLE])
            zoom = 1 / (1 + used * self.scale * _signed(draws[:, Column.SCALE]))
            cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
            shift_x = 2 * used * self.shift * _signed(draws[:, Column.SHIFT_X])
            shift_y = 2 * used * self.shift * _signed(draws[:, Column.SHIFT_Y])
            across, down = -sin / aspect, sin * aspect
            turn = torch.stack(
                [
                    torch.stack([cos, across, cos * shift_x + across * shift_y], 1),
                    torch.stack([down, cos, down * shift_x + cos * shift_y], 1),
                    torch.stack([zero, zero, one], 1),
                ],
                1,
            )
            matrix = turn @ matrix
        if self._flips():
            signs = [one, one, one]
            for column, axis in self._flips():
                signs[3 - axis] = torch.where(draws[:, column] < 0.5, -1.0, 1.0)
            matrix = matrix * torch.stack(signs, 1)[:, None]
        if self.transpose:
            swapped = matrix[:, :, [1, 0, 2]]
            matrix = torch.where(_mask(draws[:, Column.TRANSPOSE] < 0.5, 3), swapped, matrix)
        return matrix[:, :2]

    def _crop_size(
        self, draws: Tensor, range_of_area: tuple[float, float], aspect: float
    ) -> tuple[Tensor, Tensor]:
        """Return half the width and height of the crop, as shares of half the image's.

        Of several tries the first that fits the image is taken; after the last one that does not,
        it is cut to the image.
        """
        columns: list[tuple[int, int]] = [(Column.CROP_AREA, Column.CROP_SHAPE)]
        columns += [(Column.CROPS + 2 * i, Column.CROPS + 2 * i + 1) for i in range(TRIES - 1)]
        columns = columns[: self.crop_tries]
        low, high = range_of_area
        area, shape = (
            torch.stack([draws[:, i] for i in which], 1) for which in zip(*columns, strict=True)
        )
        area = low + (high - low) * area
        first, last = (math.log(a) for a in self.crop_aspect)
        shape = torch.exp(first + (last - first) * shape)
        if self.crop_tries > 1:
            shape = shape / aspect  # of pixels, where one try has that of the sides' shares
        half_w, half_h = torch.sqrt(area * shape), torch.sqrt(area / shape)
        chosen = ((half_w <= 1) & (half_h <= 1)).to(torch.uint8).argmax(1, keepdim=True)
        half_w = half_w.gather(1, chosen).squeeze(1).clamp(max=1)
        half_h = half_h.gather(1, chosen).squeeze(1).clamp(max=1)
        return half_w, half_h


AUGMENTATIONS = {
    "none": Augmentation(),
    "flips": Augmentation(flips=True),
    "dihedral": Augmentation(flips=True, transpose=True),
    # Half of the area at least: ImageNet's 0.08 would often cut a small defect away.
    "crops": Augmentation(flips=True, crop_area=(0.5, 1.0)),
    "imagenet": Augmentation(left_right=True, crop_area=(0.08, 1.0), crop_tries=TRIES),
}
AUGMENTS = tuple(AUGMENTATIONS)


def draw(seed: int, view: int, count: int) -> np.ndarray:
    """Return the random numbers of one view of each of ``count`` images, [count, DRAWS] fp32."""
    rng = np.random.default_rng((seed, view))
    first = rng.random((count, FIRST_DRAWS), dtype=np.float32)
    return np.hstack([first, rng.random((count, DRAWS - FIRST_DRAWS), dtype=np.float32)])


def find_augmentation(augment: str | Augmentation) -> Augmentation:
    """Return an augmentation, given itself or its name.

    Raises:
        InputError: the name is none of ``AUGMENTS``.
    """
    if isinstance(augment, Augmentation):
        return augment
    if augment not in AUGMENTATIONS:
        raise InputError(f"augment is {augment!r}; expected one of {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[augment]


def check_augment(augment: str | Augmentation, preprocess: Preprocess) -> None:
    """Refuse an augmentation that is not known, or that the image size rules out.

    Raises:
        InputError: it is none of ``AUGMENTS``, or needs square images.
    """
    _, height, width = preprocess.input_size
    found = find_augmentation(augment)
    if found.transpose and height != width:
        raise InputError(f"augment 'dihedral' needs square images; these are {height}×{width}")


def _mask(values: Tensor, dims: int = 4) -> Tensor:
    return values.view(-1, *(1,) * (dims - 1))


def _signed(uniform: Tensor) -> Tensor:
    """Map [0, 1) to [-1, 1)."""
    return 2 * uniform - 1
