"""Quaternion linear layers (GDPL, Cao et al.; Parcollet et al. 2019; upstream ``core_qnn``).

A feature vector of width 4·I is read as I quaternions, its four components side by side. The
layer multiplies them with a matrix of quaternions: a dense layer with a quarter of the weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.kernels.dispatch import accumulate_dtype, choose_backend, compute_dtype

# Added below the root by upstream (core_qnn/quaternion_ops.py), so trained weights depend on it.
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
    """The dense matrix of a quaternion layer: ``y = x @ matrix``.

    In Hamilton form its entries are copies of the weights with signs, so the matrix is exact.

    Args:
        weight_r, weight_i, weight_j, weight_k: [I, O], or [G, I, O] for G layers at once.
        rotation: the rotation ``w x w⁻¹`` instead of the Hamilton product ``w x``.
        scale: shaped like the weights, multiplies every entry; rotation only.
        zero_half: only the rows of the components j and k, [2·I, 4·O].

    Returns:
        [4·I, 4·O], with G in front if the weights have it, in the weights' dtype.
    """

    def assemble(columns: list[tuple[Tensor, ...]]) -> Tensor:
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
    """A quaternion linear layer in plain PyTorch; arguments as :func:`quaternion_linear`."""
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


def quaternion_linear(
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
    backend: str = "auto",
) -> Tensor:
    """A linear layer over quaternions: ``weight ⊗ x`` (Hamilton) or ``w x w⁻¹`` (rotation).

    Args:
        x: [..., 4·I], components r, i, j, k side by side; fp64, fp32, bf16 or fp16.
        weight_r, weight_i, weight_j, weight_k: [I, O] (in × out, as upstream keeps them); or
            [G, I, O], G layers in one call, each on its own ``x[g]`` [..., 4·I].
        bias: [4·O] ([G, 4·O]) or ``None``.
        rotation: rotate by the (normalised) weights; the real component of the output is then
            the bias alone.
        scale: shaped like the weights, multiplies the rotation's entries; needs
            ``rotation=True``.
        zero_half: ``x`` is [..., 2·I], the components j and k alone; r and i are zero, and the
            products with them are not done.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        [..., 4·O] in ``x``'s dtype; under autocast in autocast's.

    Raises:
        ValueError: a shape does not fit; the message names the argument and both shapes.
        BackendError: ``backend="triton"`` and the kernels do not cover the call.

    Source: upstream ``core_qnn/quaternion_ops.py``, ``quaternion_linear`` and
    ``quaternion_linear_rotation`` with ``quaternion_format=True``.
    """
    shape = tuple(weight_r.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"weight_r has shape {shape}; expected [I, O] or [G, I, O]")
    *groups, i, o = shape
    width, times = (2 * i, "two") if zero_half else (4 * i, "four")
    fits = x.dim() >= 1 and x.shape[-1] == width
    if not fits or (groups and (x.dim() < 3 or x.shape[0] != groups[0])):
        want = ", ".join([*map(str, groups), "...", str(width)])
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [{want}], {times} times the {i} rows "
            f"of weights {shape}"
        )
    expected = {
        "weight_i": (weight_i, shape),
        "weight_j": (weight_j, shape),
        "weight_k": (weight_k, shape),
        "scale": (scale, shape),
        "bias": (bias, (*groups, 4 * o)),
    }
    for name, (tensor, want) in expected.items():
        if tensor is not None and tuple(tensor.shape) != want:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {want} for weight_r {shape}"
            )
    if scale is not None and not rotation:
        raise ValueError("scale belongs to the rotation form: pass rotation=True with it")
    choose_backend(backend, "quaternion_linear has no Triton kernels in this version")
    return quaternion_linear_reference(
        x,
        weight_r,
        weight_i,
        weight_j,
        weight_k,
        bias,
        rotation=rotation,
        scale=scale,
        zero_half=zero_half,
    )
