"""Cluster attention (CLAdapter, Li et al. 2025, section 3; upstream ``Cluster_Attention``).

q   = mean over tokens of x                                          [B, C]
a   = softmax(normalize(q) @ normalize(centers, dim=0))              [B, K]
T_b = sum_k a[b, k] * transforms[k]                                  [B, R, R] or [B, N, N]

channel mode:  y = ((x @ downᵀ + down_bias) @ T_b) @ upᵀ + up_bias   [B, N, C]
token mode:    y = T_b @ x                                           [B, N, C]
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import (
    accumulate_dtype,
    cast,
    choose_backend,
    compute_dtype,
    dtypes_of_weights,
    on_device,
    weights_in_dtype_of_x,
    why_not_device,
    without_autocast,
)


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
    _check(x, centers, transforms, down_weight, down_bias, up_weight, up_bias)
    dtype = compute_dtype(x)
    why_not = _why_not_triton(x, centers, transforms, down_weight, dtype)
    if choose_backend(backend, why_not) == "reference":
        return cluster_attention_reference(
            x, centers, transforms, down_weight, down_bias, up_weight, up_bias
        )
    args = (cast(x, dtype), centers, transforms, down_weight, down_bias, up_weight, up_bias)
    training = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        save_z = training and up_weight is not None and up_weight.requires_grad
        return _forward_op(*weights_in_dtype_of_x(args), save_z)[0]
    if training and any(t is not None and t.requires_grad for t in args):
        return _Function.apply(*args)
    args = weights_in_dtype_of_x(args)
    return _forward(_passes().problem_of(args), args, save_z=False)[0]


# The kernels as operators. Eager calls go through _Function instead, which does the same with
# less on the way.


@functools.cache
def _passes():
    """The launchers: Triton is imported with the first call."""
    from . import plan as cluster_attention_passes

    return cluster_attention_passes


def _forward(problem, args, *, save_z: bool, **options) -> tuple[Tensor | None, ...]:
    x = args[0]
    with on_device(x), without_autocast(x):
        y, saved = _passes().forward(problem, args, save_z=save_z, **options)
    return (y, *saved)


def _backward(problem, g, needs, args, saved: list[Tensor | None], *weight_dtypes):
    """``saved`` is emptied, so that each of its tensors goes as soon as it has been used."""
    with on_device(g), without_autocast(g):
        return _passes().backward(problem, g, needs, args, saved, *weight_dtypes)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        # Gradients of the weights leave in their own dtype, as they were summed.
        ctx.weight_dtypes = dtypes_of_weights(args)
        args = weights_in_dtype_of_x(args)
        x, centers, transforms, down_weight, _, up_weight, _ = args
        ctx.problem = _passes().problem_of(args)
        needs = ctx.needs_input_grad
        y, *saved = _forward(ctx.problem, args, save_z=needs[5], needs=needs)
        ctx.save_for_backward(x, centers, transforms, down_weight, up_weight, *saved)
        return y

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # create_graph: what tells that there is no second derivative
            return _Function.backward_once(ctx, g)
        *args, h, mixed, state, z = ctx.saved_tensors
        saved = [h, mixed, state, z]
        del h, mixed, state, z
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        return _backward(ctx.problem, g, ctx.needs_input_grad, args, saved, ctx.weight_dtypes)

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
    args = (x, centers, transforms, down_weight, down_bias, up_weight, up_bias)
    results = _forward(_passes().problem_of(args), args, save_z=save_z)
    return tuple([x.new_empty(0) if t is None else t for t in results])


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
    problem = _passes().problem_of(
        (x, centers, transforms, down_weight, down_bias, up_weight, up_bias)
    )
    args = (x, centers, transforms, down_weight, up_weight)
    grads = _backward(problem, g, needs, args, list(saved))
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


def _why_not_triton(x, centers, transforms, down_weight, dtype) -> str | None:
    reason = why_not_device(x)
    if reason is not None:
        return reason
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {dtype}; the kernels take float32, bfloat16 and float16"
    for name, t in (("centers", centers), ("transforms", transforms)):
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} has dtype {t.dtype}"
    if x.numel() == 0:
        return f"x is empty: {tuple(x.shape)}"
    if x.shape[0] * x.shape[1] >= 2**31 - 256:
        return f"{x.shape[0] * x.shape[1]} tokens; the kernels take fewer than 2³¹"
    if centers.shape[1] > 128:
        return f"{centers.shape[1]} centers; the kernels take up to 128"
    if down_weight is not None and dtype != torch.float32 and down_weight.shape[0] > 512:
        return f"rank {down_weight.shape[0]}; the kernels take up to 512"
    return None


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
