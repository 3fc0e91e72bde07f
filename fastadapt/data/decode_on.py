"""Say what decodes image files: processes, or the GPU that computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from fastadapt.errors import InputError

if TYPE_CHECKING:
    import torch

    from fastadapt.data.resize import Geometry

DecodeOn: TypeAlias = Literal["cpu", "gpu"]
FILTERS = ("bilinear", "bicubic")  # of Pillow's, those that PyTorch has on a GPU
DECODE_HELP = (
    "Decode JPEG files in processes, or on the GPU that computes, which is faster where processes "
    "cannot keep up; other files are decoded in processes either way."
)


def check_decode(place: DecodeOn, device: torch.device) -> None:
    """Refuse to decode on a GPU where there is none, or that torchvision does not decode on.

    Args:
        place: what decodes.
        device: that computes.

    Raises:
        InputError: as said.
    """
    if place == "cpu":
        return
    if device.type != "cuda":
        raise InputError("`decode` is 'gpu', and this computes on a CPU: leave it out")
    from fastadapt.data.nvjpeg import check_nvjpeg  # Pillow: not for --help

    check_nvjpeg(device)


def check_filter(geometry: Geometry) -> None:
    """Refuse to resize on a GPU what it has no filter for.

    Raises:
        InputError: as said.
    """
    if geometry.interpolation not in FILTERS:
        raise InputError(
            f"a GPU resizes by {' or '.join(FILTERS)}, and this model asks for "
            f"{geometry.interpolation}: leave out `decode`"
        )
