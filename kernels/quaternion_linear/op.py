"""Quaternion linear layers (GDPL, Cao et al.; Parcollet et al. 2019; upstream ``core_qnn``).

A feature vector of width 4·I is read as I quaternions, its four components side by side. The
layer multiplies them with a matrix of quaternions: a dense layer with a quarter of the weights.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import (
    accumulate_dtype,
    choose_backend,
    compute_dtype,
    on_device,
    why_not_device,
    without_autocast,
)

# Added below the root by upstream (core_qnn/quaternion_ops.py), so trained weights depend on it.
ROTATION_EPS = 1e-4


def quaternion_matrix(
    weight_r: Tensor,
    weight_i: Tensor,
    weight_j: Tensor,
    weight_k: Tensor,
    *,
    rotation: bool = False,
    scale: Tensor | None = None,
    zero_half: bool = False,
) -> Tensor:
    """The dense matrix of a quaternion layer: ``y = x @ matrix``.

    In Hamilton form its entries are copies of the weights with signs, so the matrix is exact.

    Args:
        weight_r, weight_i, weight_j, weight_k: [I, O], or [G, I, O] for G layers at once.
        rotation: the rotation ``w x w⁻¹`` instead of the Hamilton product ``w x``.
        scale: shaped like the weights, multiplies every entry; rotation only.
        zero_half: only the rows of the components j and k, [2·I, 4·O].

    Returns:
        [4·I, 4·O], with G in front if the weights have it, in the weights' dtype.
    """

    def assemble(columns: list[tuple[Tensor, ...]]) -> Tensor:
        first = 2 if zero_half else 0
        return torch.cat([torch.cat(column[first:], dim=-2) for column in columns], dim=-1)

    if not rotation:
        r, i, j, k = weight_r, weight_i, weight_j, weight_k
        return assemble([(r, -i, -j, -k), (i, r, -k, j), (j, k, r, -i), (k, -j, i, r)])

    norm = (weight_r**2 + weight_i**2 + weight_j**2 + weight_k**2 + ROTATION_EPS).sqrt()
    r, i, j, k = weight_r / norm, weight_i / norm, weight_j / norm, weight_k / norm
    s = 1 if scale is None else scale
    zero = torch.zeros_like(r)
    columns = [
        (zero, zero, zero, zero),
        (zero, s * (1 - 2 * (j * j + k * k)), s * 2 * (i * j - r * k), s * 2 * (i * k + r * j)),
        (zero, s * 2 * (i * j + r * k), s * (1 - 2 * (i * i + k * k)), s * 2 * (j * k - r * i)),
        (zero, s * 2 * (i * k - r * j), s * 2 * (j * k + r * i), s * (1 - 2 * (i * i + j * j))),
    ]
    return assemble(columns)


def quaternion_linear_reference(
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
) -> Tensor:
    """A quaternion linear layer in plain PyTorch; arguments as :func:`quaternion_linear`."""
    dtype = compute_dtype(x)
    # The rotation's entries are ratios of squares: formed in fp32 at least, then rounded once.
    wide = accumulate_dtype(dtype) if rotation else dtype
    matrix = quaternion_matrix(
        *(w.to(wide) for w in (weight_r, weight_i, weight_j, weight_k)),
        rotation=rotation,
        scale=None if scale is None else scale.to(wide),
        zero_half=zero_half,
    )
    x, matrix = x.to(dtype), matrix.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        if matrix.dim() == 2:
            return F.linear(x, matrix.t(), bias)
        y = x.flatten(1, -2) @ matrix
        y = y if bias is None else y + bias[:, None]
        return y.unflatten(1, x.shape[1:-1])


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
    """A linear layer over quaternions: ``weight ⊗ x`` (Hamilton) or ``w x w⁻¹`` (rotation).

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
    described = [None if t is None else (t.shape, t.dtype) for t in (*weights, bias, scale)]
    check = _check if torch.compiler.is_compiling() else _check_once
    why_not, fast = check(x.shape, dtype, *described, rotation, zero_half)
    chosen = choose_backend(backend, why_not_device(x) or why_not, by_default=fast)
    if chosen == "reference":
        return quaternion_linear_reference(
            x, *weights, bias, rotation=rotation, scale=scale, zero_half=zero_half
        )
    args = (x.to(dtype), *weights, bias, scale)
    if torch.compiler.is_compiling():
        return _forward_op(*args, rotation, zero_half)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args):
        return _Function.apply(rotation, zero_half, *args)
    return _forward(*args, rotation, zero_half)


# The kernels as operators. Eager calls go through _Function instead, which does the same with
# less on the way.


def _launch():
    """The launchers: Triton is imported with the first call."""
    from . import launches as quaternion_linear_launch

    return quaternion_linear_launch


def _forward(x, r, i, j, k, bias, scale, rotation, zero_half) -> Tensor:
    with on_device(x), without_autocast(x):
        return _launch().forward(
            x, (r, i, j, k), bias, scale, rotation=rotation, zero_half=zero_half
        )


def _backward(g, x, r, i, j, k, bias, scale, rotation, zero_half, needs):
    """Gradients of x, of the weights and the scale as one tensor, and of the bias.

    Args:
        needs: for x, the four weights, bias and scale in this order, whether to compute theirs.
    """
    with on_device(g), without_autocast(g):
        return _launch().backward(
            g,
            x,
            (r, i, j, k),
            scale,
            rotation=rotation,
            zero_half=zero_half,
            need_x=needs[0],
            need_w=any(needs[1:5]) or needs[6],
            need_b=needs[5],
            bias_dtype=None if bias is None else bias.dtype,
        )


def _in_order(dx, dw, db, needs) -> tuple[Tensor | None, ...]:
    """What ``_backward`` gives, in the order of the arguments."""
    dw = (None,) * 5 if dw is None else (*dw.unbind(), None)
    grads = (dx, *dw[:4], db, dw[4])
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rotation, zero_half, *args):
        ctx.form = rotation, zero_half
        ctx.save_for_backward(*args)
        return _forward(*args, rotation, zero_half)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        needs = ctx.needs_input_grad[2:]
        return None, None, *_in_order(*_backward(g, *ctx.saved_tensors, *ctx.form, needs), needs)


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
    grads = [x.new_empty(x.shape)] if needs[0] else []
    if any(needs[1:5]) or needs[6]:
        kinds = 4 if scale is None else 5
        grads.append(weight_r.new_empty(kinds, *weight_r.shape))
    if needs[5]:
        grads.append(bias.new_empty(bias.shape))
    return grads


def _setup_context(ctx, inputs, output):
    *tensors, rotation, zero_half = inputs
    ctx.form = rotation, zero_half
    ctx.save_for_backward(*tensors)


def _op_backward(ctx, g):
    needs = list(ctx.needs_input_grad[:7])
    grads = iter(_backward_op(g, *ctx.saved_tensors, *ctx.form, needs))
    dx = next(grads) if needs[0] else None
    dw = next(grads) if any(needs[1:5]) or needs[6] else None
    db = next(grads) if needs[5] else None
    return *_in_order(dx, dw, db, needs), None, None


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)


def _check(x_shape, dtype, r, i, j, k, bias, scale, rotation, zero_half) -> tuple[str | None, bool]:
    """Raises ValueError for shapes that do not fit.

    Args:
        x_shape: of x.
        dtype: in which is computed.
        r, i, j, k, bias, scale: shape and dtype of each, or ``None``.

    Returns:
        Why the kernels cannot run the call, or ``None``; and whether they are fast at it.
    """
    shape = tuple(r[0])
    if len(shape) not in (2, 3):
        raise ValueError(f"weight_r has shape {shape}; expected [I, O] or [G, I, O]")
    *groups, rows, cols = shape
    width, times = (2 * rows, "two") if zero_half else (4 * rows, "four")
    fits = len(x_shape) >= 1 and x_shape[-1] == width
    if not fits or (groups and (len(x_shape) < 3 or x_shape[0] != groups[0])):
        want = ", ".join([*map(str, groups), "...", str(width)])
        raise ValueError(
            f"x has shape {tuple(x_shape)}; expected [{want}], {times} times the {rows} rows "
            f"of weights {shape}"
        )
    expected = {
        "weight_i": (i, shape),
        "weight_j": (j, shape),
        "weight_k": (k, shape),
        "scale": (scale, shape),
        "bias": (bias, (*groups, 4 * cols)),
    }
    for name, (described, want) in expected.items():
        if described is not None and tuple(described[0]) != want:
            raise ValueError(
                f"{name} has shape {tuple(described[0])}; expected {want} for weight_r {shape}"
            )
    if scale is not None and not rotation:
        raise ValueError("scale belongs to the rotation form: pass rotation=True with it")

    taken = (torch.float32, torch.bfloat16, torch.float16)
    dtypes = {"x": dtype, "weight_r": r[1], "bias": r[1] if bias is None else bias[1]}
    for name, found in dtypes.items():
        if found not in taken:
            why = f"{name} has dtype {found}; the kernels take float32, bfloat16 and float16"
            return why, False
    for name, described in (("weight_i", i), ("weight_j", j), ("weight_k", k), ("scale", scale)):
        if described is not None and described[1] != r[1]:
            why = f"weight_r has dtype {r[1]}, {name} {described[1]}; the kernels take one for all"
            return why, False
    count = groups[0] if groups else 1
    if not 1 <= count <= 65_535 or rows < 1 or cols < 1:
        why = f"weights of shape {shape}; the kernels take 1 to 65535 groups, none of them empty"
        return why, False
    m = math.prod(x_shape) // (count * width)
    if m >= 2**31 - 256:
        return f"x of shape {tuple(x_shape)}: 2³¹ rows or more", False
    # Full fp32 has no tensor cores: beyond a few rows, cuBLAS is faster with the dense matrix.
    return None, dtype != torch.float32 or m <= 64


_check_once = functools.lru_cache(maxsize=4096)(_check)
