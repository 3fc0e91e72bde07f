"""Two LayerNorms, one behind the other, as an adapter begins: each number read and written once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import choose_backend, on_device, without_autocast
from .op import check, common_dtype, default_dtype, layer_norm_reference, why_not_triton


def layer_norm_twice_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    eps: float = 1e-5,
    second_eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Two LayerNorms in plain PyTorch; arguments as :func:`layer_norm_twice`."""
    y = layer_norm_reference(x, weight, bias, eps)
    return layer_norm_reference(y, second_weight, second_bias, second_eps, dtype=dtype)


def layer_norm_twice(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    eps: float = 1e-5,
    second_eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """``layer_norm(layer_norm(x, weight, bias), second_weight, second_bias)``, all of it in fp32.

    A CLAdapter begins so: its own norm, then that of its first block. The Triton backend never
    writes what is between. For the backward it saves, beside x and parameters, four fp32 numbers
    per row; that is one pass, too, and a small sum over its programs, in a fixed order. Only
    gradients that are asked for are computed. There is no second derivative. Under
    ``torch.compile`` and ``torch.export`` the plain formulation stands for it, as for
    :func:`fastadapt.kernels.layer_norm.op`.

    Args:
        x: [..., C]; fp64, fp32, bf16 or fp16. Any strides.
        weight, bias: [C], of the first norm.
        second_weight, second_bias: [C], of the second.
        eps, second_eps: added to the variances.
        dtype: of the output. Without it, x's; under autocast fp32, as is PyTorch's policy.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [..., C].

    Raises:
        ValueError: a shape does not fit; the message names the argument and both shapes.
        BackendError: ``backend="triton"`` and the kernels do not cover the call.
    """
    check(x, weight, bias)
    check(x, second_weight, second_bias, names=("second_weight", "second_bias"))
    args = (x, weight, bias, second_weight, second_bias)
    if torch.compiler.is_compiling():
        return layer_norm_twice_reference(*args, eps, second_eps, dtype=dtype)
    if choose_backend(backend, why_not_triton(*args, dtype=dtype)) == "reference":
        return layer_norm_twice_reference(*args, eps, second_eps, dtype=dtype)
    dtype = dtype or default_dtype(x)
    if torch.is_grad_enabled() and any(t.requires_grad for t in args):
        return _Function.apply(*args, eps, second_eps, dtype)
    with on_device(x):
        return _launch().forward(*args, eps, second_eps, dtype)[0]


def _launch():
    """The kernels: Triton is imported with the first call."""
    from . import twice_triton_kernels as layer_norm_twice_triton

    return layer_norm_twice_triton


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        with on_device(args[0]):
            y, stats = _launch().forward(*args, save=True)
        *tensors, _, _, _ = args
        ctx.save_for_backward(*tensors, stats)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        *tensors, stats = ctx.saved_tensors
        need_x, *need_parameters = ctx.needs_input_grad[:5]
        sums_dtype = common_dtype(*tensors[1:]) if any(need_parameters) else None
        with on_device(g), without_autocast(g):
            dx, sums = _launch().backward(g, *tensors, stats, need_x=need_x, sums_dtype=sums_dtype)
        grads = (None,) * 4 if sums is None else sums.chunk(4)
        kept = (grad if need else None for grad, need in zip(grads, need_parameters, strict=True))
        return dx, *kept, None, None, None
