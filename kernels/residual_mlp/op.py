"""The residual MLP of a transformer block: ``x + fc2(gelu(fc1(layer_norm(x))))``.

For x [M, C], fc1 = (W₁ [H, C], b₁ [H]) and fc2 = (W₂ [C, H], b₂ [C]):

    (1)  n  = layer_norm(x)                          [M, C]
    (2)  a  = gelu(n · W₁ᵀ + b₁)                     [M, H]
    (3)  s  = slope of gelu at n · W₁ᵀ + b₁          [M, H], fp16, saved for the backward
    (4)  y  = (x + b₂) + a · W₂ᵀ                     [M, C]

and for a gradient g [M, C] of y:

    (5)  dW₂ = gᵀ · a,     db₂ = sum over rows of g
    (6)  dh  = (g · W₂) ∘ s                          [M, H],  db₁ = sum over rows of dh
    (7)  dW₁ = dhᵀ · n,    with n computed again
    (8)  dn  = dh · W₁                               [M, C]
    (9)  dx  = g + (gradient of layer_norm for dn),  and those of its weight and bias

The two products of the forward and the four of the backward are cuBLAS's; what stands between them
is one kernel each. LayerNorm writes x + b₂ as well, to which (4) adds in place; its backward adds g
and accumulates the sums. On Hopper (2) and (3) are the epilogue of their product, and so is the
factor s of (6); elsewhere each is a kernel of its own. The slope is saved rather than h: it costs
the forward little, which has both of its terms at hand, and spares the backward an exponential for
each number.

Of M = 25,088 rows, 768 channels and a hidden width of 3072 in bf16, the forward saves x (37 MiB), s
and a (147 each) and two fp32 numbers per row, and the backward never holds more than two tensors of
that width. Computing a again would halve what is saved between the two, but not the peak of one
block.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..common.dispatch import choose_backend, is_exporting, on_device, without_autocast
from ..common.side_stream import mm
from ..layer_norm.checks import common_dtype
from ..layer_norm.checks import why_not_triton as why_not_triton_rows
from .checks import check_shapes, slope_dtype, why_not_triton
from .reference import linear_gelu_reference, residual_mlp_reference

T = TypeVar("T")


class PerArgument(NamedTuple, Generic[T]):
    """One value for each tensor argument: itself, its gradient, or whether that is needed."""

    x: T
    ln_weight: T
    ln_bias: T
    fc1_weight: T
    fc1_bias: T
    fc2_weight: T
    fc2_bias: T


class WeightDtypes(NamedTuple):
    """Dtypes of both weights' gradients; ``None`` for that of x."""

    fc1: torch.dtype | None = None
    fc2: torch.dtype | None = None


def residual_mlp(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Tensor:
    """Compute ``x + fc2(gelu(fc1(layer_norm(x))))`` with exact GELU.

    Only gradients that are asked for are computed. There is no second derivative. Under
    ``torch.export`` the plain formulation stands for it, whatever the backend: exported programs
    hold ordinary operators.

    Args:
        x: [..., C]; fp64, fp32, bf16 or fp16. Any strides.
        ln_weight, ln_bias: [C].
        fc1_weight: [H, C].
        fc1_bias: [H].
        fc2_weight: [C, H].
        fc2_bias: [C].
        eps: LayerNorm's.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [..., C] in x's dtype.

    Raises:
        ValueError: a shape does not fit; the message names the argument and both shapes.
        BackendError: ``backend="triton"`` and the kernels do not cover the call.
    """
    tensors = PerArgument(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_shapes(*tensors)
    if is_exporting():
        return residual_mlp_reference(*tensors, eps)
    if choose_backend(backend, why_not_triton(*tensors)) == "reference":
        return residual_mlp_reference(*tensors, eps)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if torch.compiler.is_compiling():
        return _forward_op(*_weights_in_dtype_of_x(tensors), eps, save)[0]
    if save:
        return _ResidualMLP.apply(*tensors, eps)
    return _forward(_weights_in_dtype_of_x(tensors), eps, save=False)[0]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute ``gelu(x @ weightᵀ + bias)``, exact GELU, for inference: there is no gradient.

    Args:
        x: [..., C]; fp32, bf16 or fp16.
        weight: [H, C] in x's dtype.
        bias: [H].
        backend: as for :func:`residual_mlp`.

    Returns:
        [..., H] in x's dtype.

    Raises:
        BackendError: ``backend="triton"`` and the kernels do not cover the call.
    """
    why_not = why_not_triton_rows(x, weight, bias)
    if why_not is None and torch.is_grad_enabled():
        why_not = "gradients are on, and this operation has none"
    if choose_backend(backend, why_not) == "reference":
        return linear_gelu_reference(x, weight, bias)
    with on_device(x), without_autocast(x):
        a, _ = _linear_gelu(x.reshape(-1, x.shape[-1]), weight, bias, save=False)
    return a.view(*x.shape[:-1], len(weight))


class _Launches(NamedTuple):
    """The modules with launches: Triton is imported with the first call."""

    norm: ModuleType
    gelu: ModuleType
    hopper: ModuleType


def _launches() -> _Launches:
    from ..layer_norm import launches as norm
    from . import launches, launches_hopper

    return _Launches(norm, launches, launches_hopper)


def _weights_in_dtype_of_x(tensors: PerArgument[Tensor]) -> PerArgument[Tensor]:
    """Cast both weights, for the products: the vectors are read in any dtype."""
    dtype = tensors.x.dtype
    if tensors.fc1_weight.dtype == dtype == tensors.fc2_weight.dtype:
        return tensors
    return tensors._replace(
        fc1_weight=tensors.fc1_weight.to(dtype), fc2_weight=tensors.fc2_weight.to(dtype)
    )


def _linear_gelu(
    rows: Tensor, weight: Tensor, bias: Tensor, *, save: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute equation (2) for rows [M, C], and with ``save`` equation (3)."""
    _, gelu, hopper = _launches()
    if hopper.takes(rows, weight):
        return hopper.product_gelu(rows, weight, bias, save=save)
    # The bias follows in GELU's kernel, which takes it in any dtype.
    return gelu.gelu(torch.mm(rows, weight.t()), bias, save=save)


def _forward(
    tensors: PerArgument[Tensor], eps: float, *, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Compute equations (1) to (4).

    Returns:
        y; what the backward needs beside the arguments: LayerNorm's stats, s and a. Without
        ``save`` the first two of them are ``None``.
    """
    x = tensors.x
    width = x.shape[-1]
    with on_device(x), without_autocast(x):
        normal, stats, y = _launches().norm.forward(
            x, tensors.ln_weight, tensors.ln_bias, eps, x.dtype, save=save, added=tensors.fc2_bias
        )
        rows = normal.view(-1, width)
        del normal
        a, slope = _linear_gelu(rows, tensors.fc1_weight, tensors.fc1_bias, save=save)
        del rows
        y.view(-1, width).addmm_(a, tensors.fc2_weight.t())
    return y, stats, slope, a


class _ResidualMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps):
        # Gradients of the weights leave in their own dtype, as they were accumulated.
        ctx.weight_dtypes = WeightDtypes(fc1_weight.dtype, fc2_weight.dtype)
        tensors = _weights_in_dtype_of_x(
            PerArgument(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        )
        y, *saved = _forward(tensors, eps, save=True)
        ctx.save_for_backward(*tensors, *saved)
        ctx.eps = eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        with on_device(g), without_autocast(g):
            needs = PerArgument(*ctx.needs_input_grad[:7])
            return *_backward(g, needs, saved, ctx.eps, ctx.weight_dtypes), None


def _backward(
    g: Tensor,
    needs: PerArgument[bool],
    saved: list[Tensor],
    eps: float,
    weight_dtypes: WeightDtypes,
) -> PerArgument[Tensor | None]:
    """Compute equations (5) to (9): the gradients that ``needs`` asks for.

    Args:
        g: gradient of y, [..., C].
        saved: the arguments, stats, s and a. The list is emptied, so that each tensor is freed as
            soon as it has been used.
        weight_dtypes: of dW₁ and dW₂.
    """
    norm, gelu, hopper = _launches()
    *arguments, stats, slope, a = saved
    saved.clear()
    x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = arguments
    sums_dtype = common_dtype(ln_weight, ln_bias, fc1_bias, fc2_bias)
    need_vectors = needs.ln_weight or needs.ln_bias or needs.fc1_bias or needs.fc2_bias
    need_norm = needs.x or need_vectors
    width, hidden = x.shape[-1], slope.shape[-1]
    g = g.contiguous()
    rows = g.view(-1, width)
    grads: PerArgument[Tensor | None] = PerArgument(*[None] * 7)
    partials = None
    if needs.fc2_weight:
        grads = grads._replace(fc2_weight=mm(rows.t(), a, weight_dtypes.fc2))
    del a
    fused = hopper.takes(rows, fc2_weight)
    # Partials of the sums over rows: for ln_weight, ln_bias, fc2_bias and, unless fused, fc1_bias.
    widths = [width, width, width] if fused else [width, width, width, hidden]
    if need_vectors:
        partials = norm.new_partials(x, sum(widths))
    if need_norm or needs.fc1_weight:
        if fused:
            dh, dh_partials = hopper.product_gelu_backward(
                rows, fc2_weight, slope, sums=need_vectors
            )
        else:
            dh = torch.mm(rows, fc2_weight)
            gelu.gelu_backward(slope, dh, partials=partials, first=3 * width)
    del slope
    if needs.fc1_weight:
        normal = norm.forward(x, ln_weight, ln_bias, eps, x.dtype).out
        grads = grads._replace(fc1_weight=mm(dh.t(), normal.view(-1, width), weight_dtypes.fc1))
        del normal
    if need_norm:
        dnormal = torch.mm(dh, fc1_weight).view(x.shape)
        del dh
        dx = norm.backward(
            dnormal, x, ln_weight, stats, need_x=needs.x, residual=g, partials=partials
        )
        grads = grads._replace(x=dx)
    if need_vectors:
        sums = norm.sum_partials(partials, sums_dtype)
        dln_weight, dln_bias, dfc2_bias, *rest = sums.split(widths)
        dfc1_bias = norm.sum_partials(dh_partials, sums_dtype) if fused else rest[0]
        grads = grads._replace(
            ln_weight=dln_weight, ln_bias=dln_bias, fc1_bias=dfc1_bias, fc2_bias=dfc2_bias
        )
    return PerArgument(*[grad if need else None for grad, need in zip(grads, needs, strict=True)])


# The same as operators, for torch.compile. Eager calls go through _ResidualMLP, which costs less.


@torch.library.custom_op("fastadapt::residual_mlp", mutates_args=())
def _forward_op(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = PerArgument(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    y, stats, slope, a = _forward(tensors, eps, save=save)
    if stats is None or slope is None:
        return y, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    return y, stats, slope, a


@_forward_op.register_fake
def _(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, save):
    y = x.new_empty(x.shape)
    if not save:
        return y, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    rows = x.numel() // x.shape[-1]
    stats = x.new_empty(2, rows, dtype=torch.float32)
    a = x.new_empty(rows, fc1_weight.shape[0])
    return y, stats, torch.empty_like(a, dtype=slope_dtype(x.dtype)), a


@torch.library.custom_op("fastadapt::residual_mlp_backward", mutates_args=())
def _backward_op(g: Tensor, needs: list[bool], saved: list[Tensor], eps: float) -> list[Tensor]:
    with on_device(g), without_autocast(g):
        grads = _backward(g, PerArgument(*needs), list(saved), eps, WeightDtypes())
    # The vectors are views of one tensor, which an operator must not return.
    return [t.clone() if t.dim() == 1 else t for t in grads if t is not None]


@_backward_op.register_fake
def _(g, needs, saved, eps):
    tensors = PerArgument(*saved[:7])
    vectors = common_dtype(tensors.ln_weight, tensors.ln_bias, tensors.fc1_bias, tensors.fc2_bias)
    return [
        t.new_empty(t.shape, dtype=vectors if t.dim() == 1 else g.dtype)
        for t, need in zip(tensors, needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs: Sequence, output: Sequence[Tensor]) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _op_backward(ctx, g, *_):
    needs = list(ctx.needs_input_grad[:7])
    grads = iter(_backward_op(g, needs, list(ctx.saved_tensors), ctx.eps))
    return *[next(grads) if need else None for need in needs], None, None


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
