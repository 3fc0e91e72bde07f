"""Call nvJPEG, through torchvision."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from fastadapt.errors import InputError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEG files on a GPU; on a CPU torchvision does the same there.

    Args:
        files: uint8 [bytes], on the CPU.
        device: where pixels go.

    Returns:
        RGB of each file, uint8 [3, H, W].

    Raises:
        RuntimeError: a file cannot be decoded; it does not say which.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(files, mode=ImageReadMode.RGB, device=device)


def check_nvjpeg(device: torch.device) -> None:
    """Refuse a device that torchvision does not decode on, by decoding a small image.

    Raises:
        InputError: as said.
    """
    import torch

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        decode_jpegs([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except RuntimeError as error:
        raise InputError(
            f"torchvision does not decode JPEG files on {device} ({first_line(error)}): leave out "
            "`decode`"
        ) from None
