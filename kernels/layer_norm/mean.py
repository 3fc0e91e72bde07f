"""LayerNorm and the mean over tokens, as an adapter ends: the normalised tokens are never there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import choose_backend, on_device
from .op import check, common_dtype, default_dtype, gradients, layer_norm_reference, why_not_triton


def layer_norm_mean_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm and mean in plain PyTorch; arguments as :func:`layer_norm_mean`."""
    return layer_norm_reference(x, weight, bias, eps).mean(-2)


def layer_norm_mean(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    """``layer_norm(x, weight, bias).mean(-2)``, in fp32 until the end.

    What a CLAdapter and the pooling behind it compute last. The Triton backend sums normalised
    tokens and applies weight and bias to the mean; for the backward it saves, beside x and weight,
    two fp32 numbers per token. The backward is LayerNorm's, whose gradient is the same for all
    tokens of a sample. Only gradients that are asked for are computed. There is no second
    derivative. Under ``torch.compile`` and ``torch.export`` the plain formulation stands for it, as
    for :func:`fastadapt.kernels.layer_norm.op`.

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
    check(x, weight, bias)
    if torch.compiler.is_compiling():
        return layer_norm_mean_reference(x, weight, bias, eps)
    if choose_backend(backend, why_not_triton(x, weight, bias)) == "reference":
        return layer_norm_mean_reference(x, weight, bias, eps)
    dtype = default_dtype(x)
    tokens = x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])
    args = (tokens, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in args):
        y = _Function.apply(*args, eps, dtype)
    else:
        with on_device(x):
            y = _launch().forward(*args, eps, dtype)[0]
    return y if x.dim() == 3 else y.view(*x.shape[:-2], x.shape[-1])


def _launch():
    """The kernels: Triton is imported with the first call."""
    from . import mean_triton_kernels as layer_norm_mean_triton

    return layer_norm_mean_triton


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        with on_device(x):
            y, stats = _launch().forward(x, weight, bias, eps, dtype, save=True)
        ctx.save_for_backward(x, weight, stats)
        ctx.sums_dtype = common_dtype(weight, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, stats = ctx.saved_tensors
        # LayerNorm's backward reads it as it is, without a copy for each token.
        of_token = (g.float() / x.shape[1])[:, None].expand(x.shape)
        needs = ctx.needs_input_grad[:3]
        return *gradients(of_token, x, weight, stats, needs, ctx.sums_dtype), None, None
