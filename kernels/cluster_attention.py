"""Cluster attention (CLAdapter, Li et al. 2025, section 3; upstream ``Cluster_Attention``).

q   = mean over tokens of x                                          [B, C]
a   = softmax(normalize(q) @ normalize(centers, dim=0))              [B, K]
T_b = sum_k a[b, k] * transforms[k]                                  [B, R, R] or [B, N, N]

channel mode:  y = ((x @ downᵀ + down_bias) @ T_b) @ upᵀ + up_bias   [B, N, C]
token mode:    y = T_b @ x                                           [B, N, C]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.kernels.dispatch import accumulate_dtype, choose_backend, compute_dtype


def center_attention(x: Tensor, centers: Tensor) -> Tensor:
    """How much of each center a sample takes: cosine to its mean token, softmax over centers.

    Args:
        x: [B, N, C].
        centers: [C, K].

    Returns:
        [B, K], fp32 (fp64 if ``x`` is), rows summing to one.
    """
    dtype = accumulate_dtype(x.dtype)
    q = F.normalize(x.mean(dim=1, dtype=dtype), dim=-1)
    return (q @ F.normalize(centers.to(dtype), dim=0)).softmax(dim=-1)


def cluster_attention_reference(
    x: Tensor,
    centers: Tensor,
    transforms: Tensor,
    down_weight: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Cluster attention in plain PyTorch; arguments as :func:`cluster_attention`.

    The transforms are mixed by one product of [B, K] with [K, R·R], so that upstream's
    [B, K, R, R] never exists.
    """
    dtype = compute_dtype(x)
    x = x.to(dtype)
    # Half precision is for the products over channels; the few numbers that decide the mixing
    # stay in fp32, also under autocast.
    with torch.autocast(x.device.type, enabled=False):
        a = center_attention(x, centers).to(dtype)
        rows, cols = transforms.shape[1:]
        mixed = (a @ transforms.to(dtype).flatten(1)).unflatten(1, (rows, cols))
        if down_weight is None:
            return mixed @ x
        h = F.linear(x, down_weight.to(dtype), None if down_bias is None else down_bias.to(dtype))
        return F.linear(
            h @ mixed, up_weight.to(dtype), None if up_bias is None else up_bias.to(dtype)
        )


def cluster_attention(
    x: Tensor,
    centers: Tensor,
    transforms: Tensor,
    down_weight: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Cluster attention: every sample's tokens go through a mixture of K learned transforms.

    Channel mode with ``down_weight`` and ``up_weight``, token mode without (all four ``None``).

    Args:
        x: [B, N, C] tokens; fp64, fp32, bf16 or fp16. Any strides.
        centers: [C, K] cluster centers.
        transforms: [K, R, R] in channel mode, [K, N, N] in token mode.
        down_weight: [R, C].
        down_bias: [R] or ``None``.
        up_weight: [C, R].
        up_bias: [C] or ``None``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        [B, N, C] in ``x``'s dtype; under autocast in autocast's.

    Raises:
        ValueError: a shape does not fit; the message names the argument and both shapes.
        BackendError: ``backend="triton"`` and the kernels do not cover the call.

    Source: CLAdapter, equations 1-4; upstream ``models/modules.py``, ``Cluster_Attention``.
    """
    _check(x, centers, transforms, down_weight, down_bias, up_weight, up_bias)
    choose_backend(backend, "cluster_attention has no Triton kernels in this version")
    return cluster_attention_reference(
        x, centers, transforms, down_weight, down_bias, up_weight, up_bias
    )


def _check(x, centers, transforms, down_weight, down_bias, up_weight, up_bias) -> None:
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
    if down_weight is None:
        if down_bias is not None or up_bias is not None:
            raise ValueError("token mode (no down_weight, no up_weight) takes no biases")
        expected = {"transforms": (transforms, (k, n, n))}
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
