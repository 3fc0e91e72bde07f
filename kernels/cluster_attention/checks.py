"""Which shapes and dtypes cluster attention takes, and which of them the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import why_not_device

TAKEN = (torch.float32, torch.bfloat16, torch.float16)


def why_not_triton(
    x: Tensor,
    centers: Tensor,
    transforms: Tensor,
    down_weight: Tensor | None,
    dtype: torch.dtype,
) -> str | None:
    """Return why the kernels cannot run a call that computes in ``dtype``; ``None`` if they can."""
    reason = why_not_device(x)
    if reason is not None:
        return reason
    if dtype not in TAKEN:
        return f"dtype {dtype}; the kernels take float32, bfloat16 and float16"
    for name, t in (("centers", centers), ("transforms", transforms)):
        if t.dtype not in TAKEN:
            return f"{name} has dtype {t.dtype}"
    if x.numel() == 0:
        return f"x is empty: {tuple(x.shape)}"
    if x.shape[0] * x.shape[1] >= 2**31 - 256:
        return f"{x.shape[0] * x.shape[1]} tokens; the kernels take fewer than 2³¹"
    if centers.shape[1] > 128:
        return f"{centers.shape[1]} centers; the kernels take up to 128"
    if down_weight is not None and dtype != torch.float32 and down_weight.shape[0] > 512:
        return f"rank {down_weight.shape[0]}; the kernels take up to 512"
    return None


def check_shapes(
    x: Tensor,
    centers: Tensor,
    transforms: Tensor,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
) -> None:
    """Raise ValueError for shapes that do not fit; the message names the argument and both."""
    if x.dim() != 3:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [B, N, C]. "
            "Flatten a map [B, C, H, W] with x.flatten(2).transpose(1, 2)."
        )
    _, n, c = x.shape
    if centers.dim() != 2 or centers.shape[0] != c:
        raise ValueError(
            f"centers has shape {tuple(centers.shape)}; expected [C={c}, K] for x {tuple(x.shape)}"
        )
    k = centers.shape[1]
    if (down_weight is None) != (up_weight is None):
        raise ValueError(
            "down_weight and up_weight go together: give both (channel mode) or none (token mode)"
        )
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {}
    if down_weight is None:
        if down_bias is not None or up_bias is not None:
            raise ValueError("token mode (no down_weight, no up_weight) takes no biases")
        expected["transforms"] = (transforms, (k, n, n))
    else:
        r = down_weight.shape[0]
        expected = {
            "transforms": (transforms, (k, r, r)),
            "down_weight": (down_weight, (r, c)),
            "down_bias": (down_bias, (r,)),
            "up_weight": (up_weight, (c, r)),
            "up_bias": (up_bias, (c,)),
        }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {shape} "
                f"for x {tuple(x.shape)} and {k} centers"
            )
