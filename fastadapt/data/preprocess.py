"""Image files to what a backbone sees, the same way in training, export and verification."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastadapt.errors import InputError

EXTENSIONS = frozenset(Image.registered_extensions())
CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = tuple(filter_.name.lower() for filter_ in Image.Resampling)


def load_image(path: str | os.PathLike) -> Image.Image:
    """Reads an image file as 8-bit RGB, as :func:`to_rgb` does.

    Raises:
        InputError: the file is missing, damaged, truncated or no image, or holds floating-point
            values, which have no known range.
    """
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} cannot be read as an image: {reason}") from None
    return _eight_bit_rgb(image, str(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB.

    Grayscale is repeated three times; 16-bit images are divided by 257, so that the full range
    maps to the full range; transparent pixels become black in proportion; a camera's orientation
    tag is applied.

    Raises:
        InputError: it holds floating-point values, which have no known range, or 32-bit ones.
    """
    return _eight_bit_rgb(ImageOps.exif_transpose(image), "the image")


def _eight_bit_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale, in one of Pillow's guises
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise InputError(f"{name} holds 32-bit values outside 0–65535: save it as 16-bit")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise InputError(
            f"{name} holds floating-point values, whose range is not known: save it as 8 or 16 bit"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image.alpha_composite(rgba)
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocess:
    """timm's evaluation preprocessing, written down so that deployment can repeat it.

    Attributes:
        input_size: [3, H, W] that the backbone gets.
        interpolation: Pillow's filter for resizing, ``"bicubic"`` or ``"bilinear"``.
        crop_pct: share of the resized image that the crop keeps.
        crop_mode: ``"center"`` (shorter side resized, centre cropped), ``"squash"`` (both sides
            resized, aspect ratio lost) or ``"border"``.
        mean, std: of the normalisation, for values in [0, 1].
    """

    input_size: tuple[int, int, int]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @classmethod
    def from_pretrained_cfg(cls, config: dict[str, Any], **overrides: Any) -> Preprocess:
        """From timm's ``pretrained_cfg``; ``overrides`` that are not ``None`` win."""
        overrides = {key: value for key, value in overrides.items() if value is not None}
        known = {key: config[key] for key in cls.__dataclass_fields__ if config.get(key)}
        return cls.from_dict({**known, **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """Raises InputError for a setting that cannot be."""
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
        return result

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """An RGB image to uint8 [3, H, W]: resized and cropped, not yet normalised."""
        from timm.data import create_transform

        return create_transform(
            self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            normalize=False,
        )

    def read(self, path: str | os.PathLike) -> Tensor:
        """An image file to uint8 [3, H, W]. Raises InputError as :func:`load_image`."""
        return self.transform(load_image(path))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to the backbone's fp32 input."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images.float() / 255 - mean) / std


def is_image_file(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
