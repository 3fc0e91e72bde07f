"""The precision that a run computes in."""

from __future__ import annotations

import torch

from fastadapt.errors import InputError


def precision(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype for autocast; None for full precision.

    Raises:
        InputError: fp16 on a CPU.
    """
    if amp == "off" or (amp == "auto" and device.type == "cpu"):
        return None
    if amp == "fp16" and device.type == "cpu":
        raise InputError("amp is 'fp16', which needs a GPU: give `amp='bf16'` or off")
    if amp == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
