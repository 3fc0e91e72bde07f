"""The settings of what is drawn for training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from fastadapt.settings import Setting, Settings

if TYPE_CHECKING:
    from fastadapt.data.augment import Augmentation

AUGMENTATION = "Augmentation"
AUGMENT = Setting(
    "Random views of training images: flips, the square's symmetries (dihedral), crops of "
    "half the area or more with flips, or crops of 8 % or more with left-right flips "
    "(imagenet).",
    panel=AUGMENTATION,
)


@dataclass(frozen=True)
class AugmentSettings(Settings):
    """What is drawn for the views of training images; all of it is off by default."""

    augment: Annotated[
        Literal["none", "flips", "dihedral", "crops", "imagenet"],
        AUGMENT,
    ] = "none"
    rotation: Annotated[
        float,
        Setting(
            "Largest angle of rotation to either side, in degrees.",
            panel=AUGMENTATION,
            ge=0,
            le=180,
        ),
    ] = 0.0
    shift: Annotated[
        float,
        Setting(
            "Largest shift to either side, as a share of the image.",
            panel=AUGMENTATION,
            ge=0,
            le=1,
        ),
    ] = 0.0
    scale: Annotated[
        float,
        Setting(
            "Scale the image by 1 - scale to 1 + scale.",
            panel=AUGMENTATION,
            ge=0,
            lt=1,
        ),
    ] = 0.0
    affine_probability: Annotated[
        float,
        Setting(
            "Share of the views that are rotated, shifted and scaled.",
            panel=AUGMENTATION,
            ge=0,
            le=1,
        ),
    ] = 1.0
    border: Annotated[
        Literal["reflect", "black"],
        Setting(
            "What rotation, shift and scale show outside the image: its reflection, or black.",
            panel=AUGMENTATION,
        ),
    ] = "reflect"
    brightness: Annotated[
        float,
        Setting(
            "Largest change of brightness, as a share of the full range.",
            panel=AUGMENTATION,
            ge=0,
            le=1,
        ),
    ] = 0.0
    contrast: Annotated[
        float,
        Setting(
            "Multiply values by 1 - contrast to 1 + contrast.",
            panel=AUGMENTATION,
            ge=0,
            le=1,
        ),
    ] = 0.0
    color_probability: Annotated[
        float,
        Setting(
            "Share of the views whose brightness and contrast change.",
            panel=AUGMENTATION,
            ge=0,
            le=1,
        ),
    ] = 1.0
    blur: Annotated[
        float,
        Setting(
            "Largest standard deviation of a Gaussian blur, in pixels.",
            panel=AUGMENTATION,
            ge=0,
            le=16,
        ),
    ] = 0.0
    blur_probability: Annotated[
        float,
        Setting("Share of the views that are blurred.", panel=AUGMENTATION, ge=0, le=1),
    ] = 0.5
    erase: Annotated[
        float,
        Setting(
            "Share of the views that lose a rectangle of 2 to 33 % of the area (random erasing).",
            panel=AUGMENTATION,
            ge=0,
            le=1,
        ),
    ] = 0.0

    @property
    def augments(self) -> bool:
        """Whether anything is drawn."""
        effects = (self.rotation, self.shift, self.scale, self.brightness, self.contrast)
        return self.augment != "none" or any((*effects, self.blur, self.erase))

    def augmentation(self) -> Augmentation:
        """Return what is drawn: that of ``augment``, with the other settings."""
        from dataclasses import replace

        from fastadapt.data.augment import AUGMENTATIONS  # PyTorch: not for --help

        return replace(
            AUGMENTATIONS[self.augment],
            rotation=self.rotation,
            shift=self.shift,
            scale=self.scale,
            affine_probability=self.affine_probability,
            border=self.border,
            brightness=self.brightness,
            contrast=self.contrast,
            color_probability=self.color_probability,
            blur=self.blur,
            blur_probability=self.blur_probability,
            erase=self.erase,
        )
