"""LayerNorm over the last dimension (Ba et al. 2016), each number read and written once.

For rows x [M, C], weight w [C] and bias b [C], statistics in fp32:

    (1)  mean[m]    = 1/C · sum over c of x[m, c]
    (2)  rstd[m]    = (1/C · sum over c of (x[m, c] − mean[m])² + eps)^(−1/2)
    (3)  n[m, c]    = (x[m, c] − mean[m]) · rstd[m]
    (4)  y[m, c]    = n[m, c] · w[c] + b[c]

and for a gradient g [M, C] of y:

    (5)  h[m, c]    = g[m, c] · w[c]
    (6)  dx[m, c]   = rstd[m] · (h[m, c] − mean over c of h[m, c] − n[m, c] · mean over c of h · n)
    (7)  dw[c]      = sum over m of g[m, c] · n[m, c],   db[c] = sum over m of g[m, c]

The forward saves mean and rstd, [2, M] fp32, beside x and w. The backward is one kernel for (5) to
(7), whose programs leave partials of the sums, and one that adds the partials in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..common.dispatch import choose_backend, on_device, without_autocast
from .checks import check_vectors, common_dtype, default_dtype, why_not_triton
from .reference import add_layer_norm_reference, layer_norm_reference


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalize rows: ``(x − mean) / sqrt(variance + eps) · weight + bias``, statistics in fp32.

    The Triton backend saves for the backward, beside x and weight, two fp32 numbers per row. The
    backward is one pass and a small sum over its programs, in a fixed order. Only gradients that
    are asked for are computed. There is no second derivative.

    Under ``torch.compile`` and ``torch.export`` the plain formulation stands for it, whatever the
    backend: Inductor fuses it with what stands around it, and exported programs hold ordinary
    operators.

    Args:
        x: [..., C]; fp64, fp32, bf16 or fp16. Any strides.
        weight, bias: [C].
        eps: added to the variance.
        dtype: of the output. Without it, x's; under autocast fp32, as is PyTorch's policy. Asking
            for autocast's own, where the next operation rounds to it anyway, saves writing and
            reading fp32.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [..., C].

    Raises:
        ValueError: a shape does not fit; the message names the argument and both shapes.
        BackendError: ``backend="triton"`` and the kernels do not cover the call.
    """
    check_vectors(x, weight, bias)
    if torch.compiler.is_compiling():
        return layer_norm_reference(x, weight, bias, eps, dtype=dtype)
    why_not = why_not_triton(x, weight, bias, dtype=dtype)
    if choose_backend(backend, why_not) == "reference":
        return layer_norm_reference(x, weight, bias, eps, dtype=dtype)
    dtype = dtype or default_dtype(x)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _LayerNorm.apply(x, weight, bias, eps, dtype)
    with on_device(x):
        return _launches().forward(x, weight, bias, eps, dtype).out


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute ``x + branch`` and its LayerNorm, for inference: there is no gradient.

    Args:
        x: [..., C], the residual stream; fp32, bf16 or fp16. Any strides.
        branch: shaped as x; any of these dtypes.
        weight, bias: [C].
        eps: added to the variance.
        dtype: of the norm.
        backend: as for :func:`layer_norm`.

    Returns:
        The sum in x's dtype, rounded once, and the norm of the sum before it was rounded.

    Raises:
        ValueError: a shape does not fit; the message names the argument and both shapes.
        BackendError: ``backend="triton"`` and the kernels do not cover the call.
    """
    check_vectors(x, weight, bias)
    if branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}; expected {tuple(x.shape)}")
    why_not = why_not_triton(x, weight, bias, branch, dtype=dtype)
    if why_not is None and torch.is_grad_enabled():
        why_not = "gradients are on, and this operation has none"
    if choose_backend(backend, why_not) == "reference":
        return add_layer_norm_reference(x, branch, weight, bias, eps, dtype)
    with on_device(x):
        normal = _launches().forward(x, weight, bias, eps, dtype, branch=branch)
    return normal.total, normal.out


def _launches() -> ModuleType:
    """Import the launches, and Triton with them, on the first call."""
    from . import launches

    return launches


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        with on_device(x):
            normal = _launches().forward(x, weight, bias, eps, dtype, save=True)
        ctx.save_for_backward(x, weight, normal.stats)
        ctx.sums_dtype = common_dtype(weight, bias)
        return normal.out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        needs = ctx.needs_input_grad[:3]
        return *gradients(g, *ctx.saved_tensors, needs, ctx.sums_dtype), None, None


def gradients(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    stats: Tensor,
    needs: Sequence[bool],
    sums_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, weight and bias, ``None`` for those that are not needed.

    Args:
        g: gradient of the output, [..., C].
        stats: mean and rstd of each row, [2, M] fp32, as the forward saved them.
        needs: whether x, weight and bias need theirs.
        sums_dtype: of the gradients of weight and bias.
    """
    need_x, need_weight, need_bias = needs
    dweight = dbias = partials = None
    launches = _launches()
    with on_device(g), without_autocast(g):
        if need_weight or need_bias:
            partials = launches.new_partials(x, 2 * weight.numel())
        dx = launches.backward(g, x, weight, stats, need_x=need_x, partials=partials)
        if partials is not None:
            dweight, dbias = launches.sum_partials(partials, sums_dtype).chunk(2)
    return dx, dweight if need_weight else None, dbias if need_bias else None
