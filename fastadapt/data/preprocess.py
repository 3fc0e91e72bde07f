"""Prepare decoded images for a backbone, the same way in training, export and verification."""

from __future__ import annotations

import functools
import math
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
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            result = cls(**values)
        except TypeError as error:
            raise InputError(f"preprocessing settings do not fit: {error}") from None
        if len(result.input_size) != 3 or result.input_size[0] != 3:
            raise InputError(f"input_size is {result.input_size}; image files need (3, H, W)")
        if not 0 < result.crop_pct <= 1:
            raise InputError(f"crop_pct is {result.crop_pct}; expected more than 0, at most 1")
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

    def _check_intensity_range(self) -> None:
        value: Any = self.intensity_range
        if value is None:
            return
        numbers = isinstance(value, tuple) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
            for v in value
        )
        if not (numbers and len(value) == 2 and value[0] < value[1]):
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


@functools.cache
def _on_device(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [3, 1, 1]; made anew, they would wait for the GPU."""
    shaped = [torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std)]
    return shaped[0], shaped[1]
