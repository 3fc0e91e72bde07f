"""The residual MLP of a transformer block: ``x + fc2(gelu(fc1(layer_norm(x))))``.

The four products (six in the backward) are cuBLAS's; what stands between them is one pass each:

forward    LayerNorm, which writes x + fc2_bias, too · h = … @ fc1ᵀ · a = gelu(h + fc1_bias) and
           GELU's slope there · the last product, added to x + fc2_bias in place
backward   dfc2 from a, which is not needed any more · da = g @ fc2 · da · slope: the gradient of
           h · LayerNorm again · dfc1 · its gradient dn = dh @ fc1 · LayerNorm's backward, which
           adds g · the sums of both passes: all four vectors

On Hopper GELU is part of the product before it, and so is the slope of its; elsewhere each is a
pass of its own. The slope is kept rather than h: it costs the forward little, which has both of its
terms at hand, and spares the backward an exponential for each number.

Of M = 25,088 rows, 768 channels and a hidden width of 3072 in bf16, the forward keeps x (37 MiB),
the slope and a (147 each) and two fp32 numbers per row, and the backward never holds more than two
tensors of that width. Computing a again would halve what is kept between the two, but not the peak
of one block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import (
    choose_backend,
    compute_dtype,
    dtypes_of_weights,
    is_exporting,
    on_device,
    weights_in_dtype_of_x,
    without_autocast,
)
from ..common.side_stream import mm
from ..layer_norm.op import check, common_dtype, layer_norm_reference, why_not_triton


def residual_mlp_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """The residual MLP in plain PyTorch; arguments as :func:`residual_mlp`."""
    h = F.linear(layer_norm_reference(x, ln_weight, ln_bias, eps), fc1_weight, fc1_bias)
    return x + F.linear(F.gelu(h), fc2_weight, fc2_bias)


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
    """``x + fc2(gelu(fc1(layer_norm(x))))`` with exact GELU.

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
    args = (x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    _check(*args)
    if is_exporting():
        return residual_mlp_reference(*args, eps)
    if choose_backend(backend, _why_not_triton(*args)) == "reference":
        return residual_mlp_reference(*args, eps)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in args)
    if torch.compiler.is_compiling():
        return _forward_op(*weights_in_dtype_of_x(args), eps, save)[0]
    if save:
        return _Function.apply(*args, eps)
    return _forward(*weights_in_dtype_of_x(args), eps, save=False)[0]


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """``gelu(x @ weightᵀ + bias)``, exact GELU, for inference: it has no gradient.

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
    why_not = why_not_triton(x, weight, bias)
    if why_not is None and torch.is_grad_enabled():
        why_not = "gradients are on, and this operation has none"
    if choose_backend(backend, why_not) == "reference":
        return F.gelu(F.linear(x, weight, bias.to(x.dtype)))
    _, mlp = _launch()
    with on_device(x), without_autocast(x):
        rows = x.reshape(-1, x.shape[-1])
        if mlp.fuses(rows, weight):
            a, _ = mlp.product_gelu(rows, weight, bias, save=False)
        else:
            a, _ = mlp.gelu(torch.mm(rows, weight.t()), bias, save=False)
    return a.view(*x.shape[:-1], len(weight))


def _launch():
    """The kernels of both files: Triton is imported with the first call."""
    from ..layer_norm import triton_kernels as layer_norm_triton
    from . import triton_kernels as residual_mlp_triton

    return layer_norm_triton, residual_mlp_triton


def _forward(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, *, save):
    """The output, and with ``save`` what the backward needs beside the arguments."""
    norm, mlp = _launch()
    width = x.shape[-1]
    with on_device(x), without_autocast(x):
        normal, stats, y = norm.forward(
            x, ln_weight, ln_bias, eps, x.dtype, save=save, added=fc2_bias
        )
        rows = normal.view(-1, width)
        del normal
        if mlp.fuses(rows, fc1_weight):
            a, slope = mlp.product_gelu(rows, fc1_weight, fc1_bias, save=save)
        else:
            # The bias follows in the next pass, which takes it in any dtype.
            h = torch.mm(rows, fc1_weight.t())
            a, slope = mlp.gelu(h, fc1_bias, save=save)
        del rows
        y.view(-1, width).addmm_(a, fc2_weight.t())
    return y, stats, slope, a


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, eps = args
        # Gradients of the weights leave in their own dtype, as they were summed.
        ctx.weight_dtypes = dtypes_of_weights(tensors)
        tensors = weights_in_dtype_of_x(tensors)
        y, *saved = _forward(*tensors, eps, save=True)
        ctx.save_for_backward(*tensors, *saved)
        ctx.eps = eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        with on_device(g), without_autocast(g):
            return *_backward(g, ctx.needs_input_grad, saved, ctx.eps, ctx.weight_dtypes), None


def _backward(g, needs, saved: list[Tensor], eps: float, weight_dtypes=(None, None)):
    """The gradients of all tensors, of both weights in ``weight_dtypes`` or, if ``None``, g's.

    ``saved`` is emptied, so that each of its tensors goes as soon as it has been used.
    """
    fc1_dtype, fc2_dtype = weight_dtypes
    norm, mlp = _launch()
    x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, stats, slope, a = saved
    saved.clear()
    sums_dtype = common_dtype(ln_weight, ln_bias, fc1_bias, fc2_bias)
    need_x, need_ln_w, need_ln_b, need_w1, need_b1, need_w2, need_b2 = needs[:7]
    need_vectors = need_ln_w or need_ln_b or need_b1 or need_b2
    need_norm = need_x or need_vectors
    width, hidden = x.shape[-1], slope.shape[-1]
    g = g.contiguous()
    rows = g.view(-1, width)
    dx = dln_w = dln_b = dw1 = db1 = dw2 = db2 = parts = None
    if need_w2:
        dw2 = mm(rows.t(), a, fc2_dtype)
    del a
    fused = mlp.fuses(rows, fc2_weight)
    # Shares of the sums over rows: for ln_weight, ln_bias, fc2_bias, fc1_bias.
    vectors = [width, width, width] if fused else [width, width, width, hidden]
    if need_vectors:
        parts = norm.new_parts(x, sum(vectors))
    if need_norm or need_w1:
        if fused:
            dh, shares = mlp.product_gelu_backward(rows, fc2_weight, slope, sums=need_vectors)
        else:
            dh = torch.mm(rows, fc2_weight)
            mlp.gelu_backward(slope, dh, parts=parts, first=3 * width)
    del slope
    if need_w1:
        normal = norm.forward(x, ln_weight, ln_bias, eps, x.dtype)[0]
        dw1 = mm(dh.t(), normal.view(-1, width), fc1_dtype)
        del normal
    if need_norm:
        dnormal = torch.mm(dh, fc1_weight).view(x.shape)
        del dh
        dx = norm.backward(dnormal, x, ln_weight, stats, need_x=need_x, residual=g, parts=parts)
    if need_vectors:
        sums = norm.reduce(parts, sums_dtype)
        dln_w, dln_b, db2, *rest = sums.split(vectors)
        db1 = norm.reduce(shares, sums_dtype) if fused else rest[0]
    grads = (dx, dln_w, dln_b, dw1, db1, dw2, db2)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=False))


# The same for torch.compile. Eager calls go through _Function, with less on the way.


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
    args = (x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    results = _forward(*args, eps, save=save)
    return results if save else (results[0], *[x.new_empty(0) for _ in range(3)])


@_forward_op.register_fake
def _(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, save):
    y = x.new_empty(x.shape)
    if not save:
        return y, *[x.new_empty(0) for _ in range(3)]
    rows = x.numel() // x.shape[-1]
    stats = x.new_empty(2, rows, dtype=torch.float32)
    a = x.new_empty(rows, fc1_weight.shape[0])
    return y, stats, torch.empty_like(a, dtype=_launch()[1].slope_dtype(x.dtype)), a


@torch.library.custom_op("fastadapt::residual_mlp_backward", mutates_args=())
def _backward_op(g: Tensor, needs: list[bool], saved: list[Tensor], eps: float) -> list[Tensor]:
    with on_device(g), without_autocast(g):
        grads = _backward(g, needs, list(saved), eps)
    # The vectors are views of one tensor, which an operator must not return.
    return [t.clone() if t.dim() == 1 else t for t in grads if t is not None]


@_backward_op.register_fake
def _(g, needs, saved, eps):
    vectors = common_dtype(saved[1], saved[2], saved[4], saved[6])
    return [
        t.new_empty(t.shape, dtype=vectors if t.dim() == 1 else g.dtype)
        for t, need in zip(saved[:7], needs, strict=True)
        if need
    ]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _op_backward(ctx, g, *_):
    needs = list(ctx.needs_input_grad[:7])
    grads = iter(_backward_op(g, needs, list(ctx.saved_tensors), ctx.eps))
    return *[next(grads) if need else None for need in needs], None, None


_forward_op.register_autograd(_op_backward, setup_context=_setup_context)


def _why_not_triton(x: Tensor, *parameters: Tensor) -> str | None:
    reason = why_not_triton(x, *parameters)
    if reason is None and x.dtype != compute_dtype(x):
        return f"x in {x.dtype} under autocast to {compute_dtype(x)}"
    return reason


def _check(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias) -> None:
    check(x, ln_weight, ln_bias)
    width, hidden = x.shape[-1], fc1_weight.shape[0]
    expected = {
        "fc1_weight": (fc1_weight, (hidden, width)),
        "fc1_bias": (fc1_bias, (hidden,)),
        "fc2_weight": (fc2_weight, (width, hidden)),
        "fc2_bias": (fc2_bias, (width,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {shape} for x {tuple(x.shape)}"
            )
