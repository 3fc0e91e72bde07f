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
) -> Tensor:
    """The dense matrix of a quaternion layer: ``y = x @ matrix``.

    In Hamilton form its entries are copies of the weights with signs, so the matrix is exact.

    Args:
        weight_r, weight_i, weight_j, weight_k: [I, O].
        rotation: the rotation ``w x w⁻¹`` instead of the Hamilton product ``w x``.
        scale: [I, O], multiplies every entry; rotation only.

    Returns:
        [4·I, 4·O] in the weights' dtype.
    """
    if not rotation:
        r, i, j, k = weight_r, weight_i, weight_j, weight_k
        columns = [(r, -i, -j, -k), (i, r, -k, j), (j, k, r, -i), (k, -j, i, r)]
        return torch.cat([torch.cat(column, dim=0) for column in columns], dim=1)

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
    return torch.cat([torch.cat(column, dim=0) for column in columns], dim=1)


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
) -> Tensor:
    """A quaternion linear layer in plain PyTorch; arguments as :func:`quaternion_linear`."""
    dtype = compute_dtype(x)
    # The rotation's entries are ratios of squares: formed in fp32 at least, then rounded once.
    wide = accumulate_dtype(dtype) if rotation else dtype
    matrix = quaternion_matrix(
        *(w.to(wide) for w in (weight_r, weight_i, weight_j, weight_k)),
        rotation=rotation,
        scale=None if scale is None else scale.to(wide),
    )
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), matrix.to(dtype).t(), None if bias is None else bias.to(dtype))


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
    backend: str = "auto",
) -> Tensor:
    """A linear layer over quaternions: ``weight ⊗ x`` (Hamilton) or ``w x w⁻¹`` (rotation).

    Args:
        x: [..., 4·I], components r, i, j, k side by side; fp64, fp32, bf16 or fp16.
        weight_r, weight_i, weight_j, weight_k: [I, O] (in × out, as upstream keeps them).
        bias: [4·O] or ``None``.
        rotation: rotate by the (normalised) weights; the real component of the output is then
            the bias alone.
        scale: [I, O], multiplies the rotation's entries; needs ``rotation=True``.
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
    if len(shape) != 2:
        raise ValueError(f"weight_r has shape {shape}; expected [I, O]")
    i, o = shape
    if x.dim() < 1 or x.shape[-1] != 4 * i:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [..., {4 * i}], four times the {i} rows "
            f"of weights {shape}"
        )
    expected = {
        "weight_i": (weight_i, shape),
        "weight_j": (weight_j, shape),
        "weight_k": (weight_k, shape),
        "scale": (scale, shape),
        "bias": (bias, (4 * o,)),
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
        x, weight_r, weight_i, weight_j, weight_k, bias, rotation=rotation, scale=scale
    )
