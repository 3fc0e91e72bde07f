"""Prepare decoded images for a backbone, the same way in training, export and verification."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastadapt.data.decode import load_image
from fastadapt.data.pixels import ValueRange
from fastadapt.data.resize import Geometry
from fastadapt.errors import InputError

CROP_MODES = ("center", "squash", "border")
LARGEST_IMAGE = 2**27  # pixels of a resized image before it is cropped
LARGEST_NUMBER = 1e30
INTERPOLATIONS = tuple(filter_.name.lower() for filter_ in Image.Resampling)


@dataclass(frozen=True)
class Preprocess:
    """Hold timm's evaluation preprocessing, written down so that deployment can repeat it.

    Attributes:
        input_size: [3, H, W] that the backbone gets.
        interpolation: Pillow's filter for resizing, ``"bicubic"`` or ``"bilinear"``.
        crop_pct: share of the resized image that the crop keeps.
        crop_mode: ``"center"`` (shorter side resized, centre cropped), ``"squash"`` (both sides
            resized, aspect ratio lost) or ``"border"``.
        mean, std: of the normalisation, for values in [0, 1].
        intensity_range: the values of a file that become 0 and 255; ``None`` for the range of its
            type (:mod:`fastadapt.data.intensity`).
    """

    input_size: tuple[int, int, int]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    intensity_range: ValueRange | None = None

    @classmethod
    def from_pretrained_cfg(cls, config: dict[str, Any], **overrides: Any) -> Preprocess:
        """Take timm's ``pretrained_cfg``; ``overrides`` that are not ``None`` win."""
        overrides = {key: value for key, value in overrides.items() if value is not None}
        known = {key: config[key] for key in cls.__dataclass_fields__ if config.get(key)}
        return cls.from_dict({**known, **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """Make settings of a dictionary, as :meth:`to_dict` gives it.

        Raises:
            InputError: a setting is unknown, or has a value that cannot be.
        """
        if not isinstance(values, dict):
            raise InputError(f"the preprocessing is {values!r}; expected settings by name")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            result = cls(**values)
        except TypeError as error:
            raise InputError(f"preprocessing settings do not fit: {error}") from None
        result._check_sizes()
        if result.crop_mode not in CROP_MODES:
            raise InputError(
                f"crop_mode is {result.crop_mode!r}; expected one of {', '.join(CROP_MODES)}"
            )
        if result.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"interpolation is {result.interpolation!r}; "
                f"expected one of {', '.join(INTERPOLATIONS)}"
            )
        result._check_intensity_range()
        return result

    def _check_sizes(self) -> None:
        size: Any = self.input_size
        if (
            not _are_numbers(size, 3, int)
            or size[0] != 3
            or not 1 <= min(size) <= max(size) < 2**16
        ):
            raise InputError(f"input_size is {size!r}; image files need (3, H, W)")
        if not _are_numbers((self.crop_pct,), 1) or not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct is {self.crop_pct!r}; expected more than 0, at most 1")
        if size[1] * size[2] / self.crop_pct**2 > LARGEST_IMAGE:
            raise InputError(
                f"input_size is {size} and crop_pct {self.crop_pct}, for which images are resized "
                f"to more than {LARGEST_IMAGE:,} pixels"
            )
        for name in ("mean", "std"):
            value: Any = getattr(self, name)
            if not _are_numbers(value, 3) or (name == "std" and min(value) <= 0):
                more = "three numbers" + " above 0" * (name == "std")
                raise InputError(f"{name} is {value!r}; expected {more}")

    def _check_intensity_range(self) -> None:
        value: Any = self.intensity_range
        if value is None:
            return
        if not (_are_numbers(value, 2) and value[0] < value[1]):
            raise InputError(
                f"intensity_range is {value!r}; expected null, or two numbers of which the first "
                "is the smaller"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary for JSON files."""
        return asdict(self)

    @cached_property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Resize and crop an RGB image to uint8 [3, H, W], not yet normalised."""
        from timm.data import create_transform

        return create_transform(
            self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            normalize=False,
        )

    @property
    def geometry(self) -> Geometry:
        """How an image is resized and cropped, as :attr:`transform` does it."""
        _, height, width = self.input_size
        return Geometry(height, width, self.interpolation, self.crop_pct, self.crop_mode)

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """Read an image file as uint8 [3, H, W]. Raises InputError as :func:`load_image`."""
        return self.transform(load_image(path, self.intensity_range))

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize uint8 [B, 3, H, W] to the backbone's fp32 input."""
        mean, std = _on_device(self.mean, self.std, images.device)
        return (images.float() / 255 - mean) / std


def _are_numbers(value: Any, count: int, kind: Any = int | float) -> bool:
    """Say whether a value is a tuple of so many finite numbers."""
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)
        and all(abs(v) <= LARGEST_NUMBER for v in value)
    )


@functools.cache
def _on_device(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [3, 1, 1]; made anew, they would wait for the GPU."""
    both = torch.tensor([mean, std], dtype=torch.float32, device=device).view(2, -1, 1, 1)
    return both[0], both[1]
