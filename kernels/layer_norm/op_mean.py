"""LayerNorm and the mean over tokens, as an adapter ends: normalized tokens are never written.

With n(x) the normalized rows of x [B, N, C] (equations 1 to 3 of :mod:`.op`):

    (1)  y[b, c] = w[c] · 1/N · (sum over tokens t of n(x)[b, t, c]) + b[c]

The backward is LayerNorm's: every token of a sample has the gradient g[b, c] / N.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..common.dispatch import choose_backend, on_device
from .checks import check_vectors, common_dtype, default_dtype, why_not_triton
from .op import gradients
from .reference import layer_norm_mean_reference


def layer_norm_mean(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    """Normalize tokens and average them: ``layer_norm(x, weight, bias).mean(-2)``, in fp32.

    A CLAdapter and the pooling after it end so. The Triton backend sums normalized tokens and
    applies weight and bias to the mean; for the backward it saves, beside x and weight, two fp32
    numbers per token. Only gradients that are asked for are computed. There is no second
    derivative. Under ``torch.compile`` and ``torch.export`` the plain formulation stands for it, as
    for :func:`~.op.layer_norm`.

    Args:
        x: [..., N, C] tokens; fp64, fp32, bf16 or fp16. Any strides.
        weight, bias: [C].
        eps: added to the variance.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [..., C] in x's dtype; under autocast in fp32, as is PyTorch's policy for the norm.

    Raises:
        ValueError: a shape does not fit; the message names the argument and both shapes.
        BackendError: ``backend="triton"`` and the kernels do not cover the call.
    """
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [..., N, C]")
    check_vectors(x, weight, bias)
    if torch.compiler.is_compiling():
        return layer_norm_mean_reference(x, weight, bias, eps)
    if choose_backend(backend, why_not_triton(x, weight, bias)) == "reference":
        return layer_norm_mean_reference(x, weight, bias, eps)
    dtype = default_dtype(x)
    tokens = x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])
    tensors = (tokens, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        y = _LayerNormMean.apply(*tensors, eps, dtype)
    else:
        with on_device(x):
            y = _launches().forward(*tensors, eps, dtype)[0]
    return y if x.dim() == 3 else y.view(*x.shape[:-2], x.shape[-1])


def _launches() -> ModuleType:
    """Import the launches, and Triton with them, on the first call."""
    from . import launches_mean

    return launches_mean


class _LayerNormMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        with on_device(x):
            y, stats = _launches().forward(x, weight, bias, eps, dtype, save=True)
        ctx.save_for_backward(x, weight, stats)
        ctx.sums_dtype = common_dtype(weight, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, stats = ctx.saved_tensors
        # LayerNorm's backward reads the expanded gradient as it is: no copy for each token.
        of_token = (g.float() / x.shape[1])[:, None].expand(x.shape)
        needs = ctx.needs_input_grad[:3]
        return *gradients(of_token, x, weight, stats, needs, ctx.sums_dtype), None, None
