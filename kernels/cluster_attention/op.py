"""The public function: checks, choice of backend, autograd, and operators for ``torch.compile``.

What is computed is defined in :mod:`fastadapt.kernels.cluster_attention.reference`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.dispatch import (
    cast,
    choose_backend,
    compute_dtype,
    on_device,
    without_autocast,
)
from .checks import check_shapes, why_not_triton
from .problem import (
    NO_NEEDS,
    Arguments,
    Problem,
    ProjectionDtypes,
    Saved,
    problem_of,
    with_weights_in_dtype_of_x,
)
from .reference import cluster_attention_reference


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
    """Send every sample's tokens through a mixture of K learned transforms.

    Channel mode with ``down_weight`` and ``up_weight``, token mode without (all four ``None``).

    In half precision the Triton backend fuses the products of channel mode; in fp32 and in token
    mode they are PyTorch's (TF32 where PyTorch allows it) and attention and mixing are Triton's.
    For the backward it saves, beside the arguments, in channel mode the tokens after the down
    projection and, if ``up_weight`` needs a gradient, after T_b (2 × [B, N, R]; the second costs
    less to keep than to compute again), the mixed transforms [B, R, R] and fp32 vectors of
    B·(C + 2K) numbers. Only gradients that are asked for are computed. There is no second
    derivative.

    Args:
        x: [B, N, C] tokens; fp64, fp32, bf16 or fp16. Any strides.
        centers: [C, K] cluster centers.
        transforms: [K, R, R] in channel mode, [K, N, N] in token mode.
        down_weight: [R, C].
        down_bias: [R] or ``None``.
        up_weight: [C, R].
        up_bias: [C] or ``None``.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [B, N, C] in ``x``'s dtype; under autocast in autocast's.

    Raises:
        ValueError: a shape does not fit; the message names the argument and both shapes.
        BackendError: ``backend="triton"`` and the kernels do not cover the call.

    Source: CLAdapter, equations 1-4; upstream ``models/modules.py``, ``Cluster_Attention``.
    """
    check_shapes(x, centers, transforms, down_weight, down_bias, up_weight, up_bias)
    dtype = compute_dtype(x)
    why_not = why_not_triton(x, centers, transforms, down_weight, dtype)
    if choose_backend(backend, why_not) == "reference":
        return cluster_attention_reference(
            x, centers, transforms, down_weight, down_bias, up_weight, up_bias
        )
    args = Arguments(
        cast(x, dtype), centers, transforms, down_weight, down_bias, up_weight, up_bias
    )
    training = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        save_z = training and up_weight is not None and up_weight.requires_grad
        return _forward_op(*with_weights_in_dtype_of_x(args), save_z)[0]
    if training and any(t is not None and t.requires_grad for t in args):
        return _Function.apply(*args)
    args = with_weights_in_dtype_of_x(args)
    return _forward(problem_of(args), args, save_z=False)[0]


# The kernels as operators. Eager calls go through _Function instead, which does the same with
# less on the way.


@functools.cache
def _plans() -> tuple[Callable, Callable]:
    """Return the forward and the backward: Triton is imported with the first call."""
    from .plan_backward import backward
    from .plan_forward import forward

    return forward, backward


def _forward(
    problem: Problem,
    args: Arguments[Any],
    *,
    save_z: bool,
    needs: Arguments[bool] = NO_NEEDS,
) -> tuple[Tensor, Saved]:
    forward, _ = _plans()
    with on_device(args.x), without_autocast(args.x):
        return forward(problem, args, save_z=save_z, needs=needs)


def _backward(
    problem: Problem,
    g: Tensor,
    needs: Arguments[bool],
    args: Arguments[Any],
    saved: Saved,
    weight_dtypes: ProjectionDtypes,
) -> Arguments[Tensor | None]:
    _, backward = _plans()
    with on_device(g), without_autocast(g):
        return backward(problem, g, needs, args, saved, weight_dtypes)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        args = Arguments(*tensors)
        # Gradients of the weights leave in their own dtype, as they were summed.
        ctx.weight_dtypes = ProjectionDtypes(
            *[None if t is None else t.dtype for t in (args.down_weight, args.up_weight)]
        )
        args = with_weights_in_dtype_of_x(args)
        ctx.problem = problem_of(args)
        needs = Arguments(*ctx.needs_input_grad)
        y, saved = _forward(ctx.problem, args, save_z=needs.up_weight, needs=needs)
        x, centers, transforms, down_weight, _, up_weight, _ = args
        kept = (saved.h, saved.mixed, saved.state, saved.z)
        ctx.save_for_backward(x, centers, transforms, down_weight, up_weight, *kept)
        return y

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # create_graph: what tells that there is no second derivative
            return _Function.backward_once(ctx, g)
        x, centers, transforms, down_weight, up_weight, h, mixed, state, z = ctx.saved_tensors
        args = Arguments(x, centers, transforms, down_weight, None, up_weight, None)
        saved = Saved(h, mixed, state, z)
        del h, mixed, state, z
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        needs = Arguments(*ctx.needs_input_grad)
        return _backward(ctx.problem, g, needs, args, saved, ctx.weight_dtypes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward_once(ctx, g):
        return _Function.backward(ctx, g)


@torch.library.custom_op("fastadapt::cluster_attention", mutates_args=())
def _forward_op(
    x: Tensor,
    centers: Tensor,
    transforms: Tensor,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    save_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = Arguments(x, centers, transforms, down_weight, down_bias, up_weight, up_bias)
    y, saved = _forward(problem_of(args), args, save_z=save_z)
    results = (y, saved.h, saved.mixed, saved.state, saved.z)
    y, h, mixed, state, z = [x.new_empty(0) if t is None else t for t in results]
    return y, h, mixed, state, z


@_forward_op.register_fake
def _(x, centers, transforms, down_weight, down_bias, up_weight, up_bias, save_z):
    b, n, c = x.shape
    k = centers.shape[1]
    m = transforms.shape[1]
    h = x.new_empty(0)
    if down_weight is not None:
        if x.dtype != torch.float32:
            m = (m + 7) // 8 * 8  # the kernels' padding
        h = x.new_empty(b * n, m)
    state = x.new_empty(b * (2 * k + c + 1) + k, dtype=torch.float32)
    z = torch.empty_like(h) if save_z else x.new_empty(0)
    return x.new_empty(b, n, c), h, x.new_empty(b, m, m), state, z


@torch.library.custom_op("fastadapt::cluster_attention_backward", mutates_args=())
def _backward_op(
    g: Tensor,
    needs: list[bool],
    x: Tensor,
    centers: Tensor,
    transforms: Tensor,
    down_weight: Tensor | None,
    down_bias: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    saved: list[Tensor],
) -> list[Tensor]:
    args = Arguments(x, centers, transforms, down_weight, down_bias, up_weight, up_bias)
    grads = _backward(
        problem_of(args), g, Arguments(*needs), args, Saved(*saved), ProjectionDtypes()
    )
    return [grad for grad in grads if grad is not None]


@_backward_op.register_fake
def _(g, needs, x, centers, transforms, down_weight, down_bias, up_weight, up_bias, saved):
    args = (x, centers, transforms, down_weight, down_bias, up_weight, up_bias)
    return [
        t.new_empty(t.shape) for t, need in zip(args, needs, strict=True) if t is not None and need
    ]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], *output[1:])


def _op_backward(ctx, g, *_):
    *args, h, mixed, state, z = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:-1])
    grads = iter(_backward_op(g, needs, *args, [h, mixed, state, z]))
    return (*(next(grads) if need else None for need in needs), None)


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)
