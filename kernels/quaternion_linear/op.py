"""Quaternion linear layers (GDPL, Cao et al.; Parcollet et al. 2019; upstream ``core_qnn``).

A feature vector of width 4·I is read as I quaternions, its components r, i, j, k side by side. The
layer multiplies them with a matrix of quaternions: a dense layer with a quarter of the weights. For
x [M, 4·I], weights W_r, W_i, W_j, W_k [I, O] and a bias [4·O], without the bias:

    (1)  y_r = x_r·W_r − x_i·W_i − x_j·W_j − x_k·W_k
    (2)  y_i = x_r·W_i + x_i·W_r − x_j·W_k + x_k·W_j
    (3)  y_j = x_r·W_j + x_i·W_k + x_j·W_r − x_k·W_i
    (4)  y_k = x_r·W_k − x_i·W_j + x_j·W_i + x_k·W_r                        each [M, O]

The rotation ``w x w⁻¹`` uses, with r, i, j, k the weights divided by sqrt(r²+i²+j²+k²+1e-4), entry
by entry:

    (5)  y_i = x_i·(1−2(j²+k²)) + x_j·2(ij−rk) + x_k·2(ik+rj),      y_r = 0
    (6)  y_j = x_i·2(ij+rk) + x_j·(1−2(i²+k²)) + x_k·2(jk−ri)
    (7)  y_k = x_i·2(ik−rj) + x_j·2(jk+ri) + x_k·(1−2(i²+j²))
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import (
    choose_backend,
    compute_dtype,
    on_device,
    why_not_device,
    without_autocast,
)
from .checks import check_call, check_call_once
from .reference import quaternion_linear_reference


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
    """Multiply quaternions with a matrix of them: ``weight ⊗ x``, or the rotation ``w x w⁻¹``.

    The Triton backend reads each weight for all of its uses and never builds the dense matrix,
    nor its gradient. For the backward only the arguments are saved (x as computed with, under
    autocast); only gradients that are asked for are computed. There is no second derivative.

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
        backend: ``"auto"`` (Triton for CUDA tensors it covers, but not in fp32 with more than 64
            rows, where the reference is faster), ``"triton"`` or ``"reference"``.

    Returns:
        [..., 4·O] in ``x``'s dtype; under autocast in autocast's.

    Raises:
        ValueError: a shape does not fit; the message names the argument and both shapes.
        BackendError: ``backend="triton"`` and the kernels do not cover the call.

    Source: upstream ``core_qnn/quaternion_ops.py``, ``quaternion_linear`` and
    ``quaternion_linear_rotation`` with ``quaternion_format=True``.
    """
    weights = (weight_r, weight_i, weight_j, weight_k)
    dtype = compute_dtype(x)
    r, i, j, k = [(w.shape, w.dtype) for w in weights]
    b = None if bias is None else (bias.shape, bias.dtype)
    s = None if scale is None else (scale.shape, scale.dtype)
    check = check_call if torch.compiler.is_compiling() else check_call_once
    support = check(x.shape, dtype, r, i, j, k, b, s, rotation, zero_half)
    why_not = why_not_device(x) or support.why_not
    chosen = choose_backend(backend, why_not, by_default=support.fast)
    if chosen == "reference":
        return quaternion_linear_reference(
            x, *weights, bias, rotation=rotation, scale=scale, zero_half=zero_half
        )
    tensors = (x.to(dtype), *weights, bias, scale)
    if torch.compiler.is_compiling():
        return _forward_op(*tensors, rotation, zero_half)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _QuaternionLinear.apply(rotation, zero_half, *tensors)
    return _forward(*tensors, rotation, zero_half)


def _launches() -> ModuleType:
    """Import the launches, and Triton with them, on the first call."""
    from . import launches

    return launches


def _forward(x, r, i, j, k, bias, scale, rotation: bool, zero_half: bool) -> Tensor:
    with on_device(x), without_autocast(x):
        return _launches().forward(
            x, (r, i, j, k), bias, scale, rotation=rotation, zero_half=zero_half
        )


def _backward(
    g, x, r, i, j, k, bias, scale, rotation: bool, zero_half: bool, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of x, of the weights and the scale as one tensor, and of the bias.

    Args:
        needs: for x, the four weights, bias and scale in this order, whether to compute theirs.
    """
    needed = _needed(needs)
    with on_device(g), without_autocast(g):
        return _launches().backward(
            g,
            x,
            (r, i, j, k),
            scale,
            rotation=rotation,
            zero_half=zero_half,
            need_x=needed.x,
            need_w=needed.weights,
            need_b=needed.bias,
            bias_dtype=None if bias is None else bias.dtype,
        )


class _Needed(NamedTuple):
    """Which of the results of :func:`_backward` are needed."""

    x: bool
    weights: bool  # any of them, or the scale
    bias: bool


def _needed(needs: Sequence[bool]) -> _Needed:
    need_x, *need_weights, need_bias, need_scale = needs
    return _Needed(need_x, any(need_weights) or need_scale, need_bias)


def _in_order(
    dx: Tensor | None, dw: Tensor | None, db: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Put the results of :func:`_backward` into the order of the arguments."""
    dr = di = dj = dk = dscale = None
    if dw is not None:
        dr, di, dj, dk, *rest = dw.unbind()
        dscale = rest[0] if rest else None
    grads = (dx, dr, di, dj, dk, db, dscale)
    return tuple([grad if need else None for grad, need in zip(grads, needs, strict=True)])


class _QuaternionLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rotation, zero_half, *tensors):
        ctx.form = rotation, zero_half
        ctx.save_for_backward(*tensors)
        return _forward(*tensors, rotation, zero_half)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        needs = ctx.needs_input_grad[2:]
        return None, None, *_in_order(*_backward(g, *ctx.saved_tensors, *ctx.form, needs), needs)


# The same as operators, for torch.compile. Eager calls go through _QuaternionLinear, which costs
# less.


@torch.library.custom_op("fastadapt::quaternion_linear", mutates_args=())
def _forward_op(
    x: Tensor,
    weight_r: Tensor,
    weight_i: Tensor,
    weight_j: Tensor,
    weight_k: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    rotation: bool,
    zero_half: bool,
) -> Tensor:
    weights = (weight_r, weight_i, weight_j, weight_k)
    return _forward(x, *weights, bias, scale, rotation, zero_half)


@_forward_op.register_fake
def _(x, weight_r, weight_i, weight_j, weight_k, bias, scale, rotation, zero_half):
    return x.new_empty(*x.shape[:-1], 4 * weight_r.shape[-1])


@torch.library.custom_op("fastadapt::quaternion_linear_backward", mutates_args=())
def _backward_op(
    g: Tensor,
    x: Tensor,
    weight_r: Tensor,
    weight_i: Tensor,
    weight_j: Tensor,
    weight_k: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    rotation: bool,
    zero_half: bool,
    needs: list[bool],
) -> list[Tensor]:
    weights = (weight_r, weight_i, weight_j, weight_k)
    grads = _backward(g, x, *weights, bias, scale, rotation, zero_half, needs)
    return [grad for grad in grads if grad is not None]


@_backward_op.register_fake
def _(g, x, weight_r, weight_i, weight_j, weight_k, bias, scale, rotation, zero_half, needs):
    needed = _needed(needs)
    grads = [x.new_empty(x.shape)] if needed.x else []
    if needed.weights:
        kinds = 4 if scale is None else 5
        grads.append(weight_r.new_empty(kinds, *weight_r.shape))
    if needed.bias:
        grads.append(bias.new_empty(bias.shape))
    return grads


def _setup_context(ctx, inputs, output):
    *tensors, rotation, zero_half = inputs
    ctx.form = rotation, zero_half
    ctx.save_for_backward(*tensors)


def _op_backward(ctx, g):
    needs = list(ctx.needs_input_grad[:7])
    grads = iter(_backward_op(g, *ctx.saved_tensors, *ctx.form, needs))
    needed = _needed(needs)
    dx = next(grads) if needed.x else None
    dw = next(grads) if needed.weights else None
    db = next(grads) if needed.bias else None
    return *_in_order(dx, dw, db, needs), None, None


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
