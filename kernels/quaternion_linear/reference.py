"""Quaternion linear layers in plain PyTorch: the ground truth of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import accumulate_dtype, compute_dtype

# Added under the root by upstream (core_qnn/quaternion_ops.py), so trained weights depend on it.
ROTATION_EPS = 1e-4


def quaternion_matrix(
    weight_r: Tensor,
    weight_i: Tensor,
    weight_j: Tensor,
    weight_k: Tensor,
    *,
    rotation: bool = False,
    scale: Tensor | None = None,
    zero_half: bool = False,
) -> Tensor:
    """Build the dense matrix of a quaternion layer, ``y = x @ matrix``.

    In Hamilton form its entries are copies of the weights with signs, so the matrix is exact.

    Args:
        weight_r, weight_i, weight_j, weight_k: [I, O], or [G, I, O] for G layers at once.
        rotation: the rotation ``w x w⁻¹`` instead of the Hamilton product ``w x``.
        scale: shaped like the weights, multiplies every entry; rotation only.
        zero_half: only the rows of the components j and k, [2·I, 4·O].

    Returns:
        [4·I, 4·O], or [G, 4·I, 4·O] if the weights have G, in the weights' dtype.
    """

    def assemble(columns: Sequence[tuple[Tensor, ...]]) -> Tensor:
        first = 2 if zero_half else 0
        return torch.cat([torch.cat(column[first:], dim=-2) for column in columns], dim=-1)

    if not rotation:
        r, i, j, k = weight_r, weight_i, weight_j, weight_k
        return assemble([(r, -i, -j, -k), (i, r, -k, j), (j, k, r, -i), (k, -j, i, r)])

    norm = (weight_r**2 + weight_i**2 + weight_j**2 + weight_k**2 + ROTATION_EPS).sqrt()
    r, i, j, k = weight_r / norm, weight_i / norm, weight_j / norm, weight_k / norm
    s = 1 if scale is None else scale
    zero = torch.zeros_like(r)
    columns = [
        (zero, zero, zero, zero),
        (zero, s * (1 - 2 * (j * j + k * k)), s * 2 * (i * j - r * k), s * 2 * (i * k + r * j)),
        (zero, s * 2 * (i * j + r * k), s * (1 - 2 * (i * i + k * k)), s * 2 * (j * k - r * i)),
        (zero, s * 2 * (i * k - r * j), s * 2 * (j * k + r * i), s * (1 - 2 * (i * i + j * j))),
    ]
    return assemble(columns)


def quaternion_linear_reference(
    x: Tensor,
    weight_r: Tensor,
    weight_i: Tensor,
    weight_j: Tensor,
    weight_k: Tensor,
    bias: Tensor | None = None,
    *,
    rotation: bool = False,
    scale: Tensor | None = None,
    zero_half: bool = False,
) -> Tensor:
    """Multiply with the dense matrix in plain PyTorch; arguments as :func:`~.op.quaternion_linear`.

    Computes in x's dtype, or in autocast's.
    """
    dtype = compute_dtype(x)
    # The rotation's entries are ratios of squares: formed in fp32 at least, then rounded once.
    wide = accumulate_dtype(dtype) if rotation else dtype
    matrix = quaternion_matrix(
        *(w.to(wide) for w in (weight_r, weight_i, weight_j, weight_k)),
        rotation=rotation,
        scale=None if scale is None else scale.to(wide),
        zero_half=zero_half,
    )
    x, matrix = x.to(dtype), matrix.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        if matrix.dim() == 2:
            return F.linear(x, matrix.t(), bias)
        y = x.flatten(1, -2) @ matrix
        y = y if bias is None else y + bias[:, None]
        return y.unflatten(1, x.shape[1:-1])
