"""Which shapes and dtypes a quaternion linear layer takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

TAKEN = (torch.float32, torch.bfloat16, torch.float16)


class _Tensor(NamedTuple):
    shape: Sequence[int]
    dtype: torch.dtype


class Support(NamedTuple):
    """What the kernels can do about a call."""

    why_not: str | None  # the reason why they cannot run it; None if they can
    fast: bool  # faster than the reference


# Shape and dtype of a tensor, in a plain tuple: what is made in each call costs time.
Described = tuple[Sequence[int], torch.dtype]


def check_call(
    x_shape: Sequence[int],
    dtype: torch.dtype,
    r: Described,
    i: Described,
    j: Described,
    k: Described,
    bias: Described | None,
    scale: Described | None,
    rotation: bool,
    zero_half: bool,
) -> Support:
    """Raise ValueError for shapes that do not fit, and say what the kernels can do.

    Args:
        x_shape: of x.
        dtype: in which is computed.
        r, i, j, k, bias, scale: shape and dtype of each, or ``None``.
        rotation, zero_half: as for ``quaternion_linear``.
    """
    weights = {
        f"weight_{name}": _Tensor(*described)
        for name, described in zip("rijk", (r, i, j, k), strict=True)
    }
    others = {
        name: _Tensor(*described)
        for name, described in (("scale", scale), ("bias", bias))
        if described is not None
    }
    weight = weights["weight_r"]
    shape = tuple(weight.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"weight_r has shape {shape}; expected [I, O] or [G, I, O]")
    *groups, rows, cols = shape
    width, times = (2 * rows, "two") if zero_half else (4 * rows, "four")
    fits = len(x_shape) >= 1 and x_shape[-1] == width
    if not fits or (groups and (len(x_shape) < 3 or x_shape[0] != groups[0])):
        want = ", ".join([*map(str, groups), "...", str(width)])
        raise ValueError(
            f"x has shape {tuple(x_shape)}; expected [{want}], {times} times the {rows} rows "
            f"of weights {shape}"
        )
    for name, found in {**weights, **others}.items():
        expected = (*groups, 4 * cols) if name == "bias" else shape
        if tuple(found.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(found.shape)}; expected {expected} for weight_r {shape}"
            )
    if scale is not None and not rotation:
        raise ValueError("scale belongs to the rotation form: pass rotation=True with it")

    bias_dtype = others["bias"].dtype if "bias" in others else weight.dtype
    for name, taken in (("x", dtype), ("weight_r", weight.dtype), ("bias", bias_dtype)):
        if taken not in TAKEN:
            why = f"{name} has dtype {taken}; the kernels take float32, bfloat16 and float16"
            return Support(why, False)
    for name, found in {**weights, **others}.items():
        if name != "bias" and found.dtype != weight.dtype:
            why = f"weight_r has dtype {weight.dtype}, {name} {found.dtype}; "
            return Support(why + "the kernels take one for all", False)
    count = groups[0] if groups else 1
    if not 1 <= count <= 65_535 or rows < 1 or cols < 1:
        why = f"weights of shape {shape}; the kernels take 1 to 65535 groups, none of them empty"
        return Support(why, False)
    m = math.prod(x_shape) // (count * width)
    if m >= 2**31 - 256:
        return Support(f"x of shape {tuple(x_shape)}: 2³¹ rows or more", False)
    # Full fp32 has no tensor cores: beyond a few rows, cuBLAS is faster with the dense matrix.
    return Support(None, dtype != torch.float32 or m <= 64)


check_call_once = functools.lru_cache(maxsize=4096)(check_call)
