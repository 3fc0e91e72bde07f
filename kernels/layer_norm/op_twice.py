"""Two LayerNorms in a row, as an adapter begins: each number is read and written once.

With n(x) the normalized rows of x [M, C] (equations 1 to 3 of :mod:`.op`):

    (1)  u = n(x) · w₁ + b₁
    (2)  y = n(u) · w₂ + b₂

and for a gradient g [M, C] of y, with D(h, n) the gradient of rows whose normalized ones are n and
have the gradient h (equation 6 there):

    (3)  du  = D(g · w₂, n(u)),     dx  = D(du · w₁, n(x))
    (4)  dw₁ = sum over rows of du · n(x),  db₁ = sum over rows of du
    (5)  dw₂ = sum over rows of g · n(u),   db₂ = sum over rows of g

u is never written: the backward computes it again from x and four fp32 numbers per row.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..common.dispatch import choose_backend, on_device, without_autocast
from .checks import check_vectors, common_dtype, default_dtype, why_not_triton
from .reference import layer_norm_twice_reference


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
    """Normalize rows, scale and shift them, and do so once more, all of it in fp32.

    Equals ``layer_norm(layer_norm(x, weight, bias), second_weight, second_bias)``. A CLAdapter
    begins so: its own norm, then that of its first block. The Triton backend never writes what is
    between. For the backward it saves, beside x and parameters, four fp32 numbers per row; that is
    one pass, too, and a small sum over its programs, in a fixed order. Only gradients that are
    asked for are computed. There is no second derivative. Under ``torch.compile`` and
    ``torch.export`` the plain formulation stands for it, as for :func:`~.op.layer_norm`.

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
    check_vectors(x, weight, bias)
    check_vectors(x, second_weight, second_bias, names=("second_weight", "second_bias"))
    tensors = (x, weight, bias, second_weight, second_bias)
    if torch.compiler.is_compiling():
        return layer_norm_twice_reference(*tensors, eps, second_eps, dtype=dtype)
    if choose_backend(backend, why_not_triton(*tensors, dtype=dtype)) == "reference":
        return layer_norm_twice_reference(*tensors, eps, second_eps, dtype=dtype)
    dtype = dtype or default_dtype(x)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _LayerNormTwice.apply(*tensors, eps, second_eps, dtype)
    with on_device(x):
        return _launches().forward(*tensors, eps, second_eps, dtype)[0]


def _launches() -> ModuleType:
    """Import the launches, and Triton with them, on the first call."""
    from . import launches_twice

    return launches_twice


class _LayerNormTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, second_weight, second_bias, eps, second_eps, dtype):
        tensors = (x, weight, bias, second_weight, second_bias)
        with on_device(x):
            y, stats = _launches().forward(*tensors, eps, second_eps, dtype, save=True)
        ctx.save_for_backward(*tensors, stats)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        *tensors, stats = ctx.saved_tensors
        need_x, *need_vectors = ctx.needs_input_grad[:5]
        sums_dtype = common_dtype(*tensors[1:]) if any(need_vectors) else None
        with on_device(g), without_autocast(g):
            dx, sums = _launches().backward(
                g, *tensors, stats, need_x=need_x, sums_dtype=sums_dtype
            )
        grads = (None,) * 4 if sums is None else sums.chunk(4)
        kept = (grad if need else None for grad, need in zip(grads, need_vectors, strict=True))
        return dx, *kept, None, None, None
