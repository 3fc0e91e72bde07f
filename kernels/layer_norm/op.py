"""LayerNorm over the last dimension (Ba et al. 2016), each number read and written once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.dispatch import choose_backend, on_device, why_not_device, without_autocast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (Tensor, torch.nn.Parameter)
MIN_WIDTH, MAX_WIDTH = 8, 8192  # a program holds whole rows


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm in plain PyTorch; arguments as :func:`layer_norm`."""
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y if dtype is None else y.to(dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """``(x − mean) / sqrt(variance + eps) · weight + bias``, statistics in fp32.

    The Triton backend saves for the backward, beside x and weight, two fp32 numbers per row. The
    backward is one pass and a small sum over its programs, in a fixed order. Only gradients that
    are asked for are computed. There is no second derivative.

    Under ``torch.compile`` and ``torch.export`` the plain formulation stands for it, whatever the
    backend: Inductor fuses it with what stands around it, and exported programs hold ordinary
    operators.

    Args:
        x: [..., C]; fp64, fp32, bf16 or fp16. Any strides.
        weight, bias: [C].
        eps: added to the variance.
        dtype: of the output. Without it, x's; under autocast fp32, as is PyTorch's policy. Asking
            for autocast's own, where the next operation rounds to it anyway, saves the numbers in
            fp32.
        backend: ``"auto"`` (Triton for CUDA tensors it covers, else the reference), ``"triton"``
            (an error that names the reason where it can't) or ``"reference"``.

    Returns:
        [..., C].

    Raises:
        ValueError: a shape does not fit; the message names the argument and both shapes.
        BackendError: ``backend="triton"`` and the kernels do not cover the call.
    """
    check(x, weight, bias)
    if torch.compiler.is_compiling():
        return layer_norm_reference(x, weight, bias, eps, dtype=dtype)
    why_not = why_not_triton(x, weight, bias, dtype=dtype)
    if choose_backend(backend, why_not) == "reference":
        return layer_norm_reference(x, weight, bias, eps, dtype=dtype)
    dtype = dtype or default_dtype(x)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _Function.apply(x, weight, bias, eps, dtype)
    with on_device(x):
        return _launch().forward(x, weight, bias, eps, dtype)[0]


def add_layer_norm_reference(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum and LayerNorm in plain PyTorch; arguments as :func:`add_layer_norm`."""
    total = (x.float() + branch.float()).to(x.dtype)
    # PyTorch's takes all in one dtype on a GPU.
    normal = layer_norm_reference(total.float(), weight.float(), bias.float(), eps, dtype=dtype)
    return total, normal


def add_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``x + branch`` and the LayerNorm of that, for inference: it has no gradient.

    Args:
        x: [..., C], the residual stream; fp32, bf16 or fp16. Any strides.
        branch: shaped as x; any of these dtypes.
        weight, bias: [C].
        eps: added to the variance.
        dtype: of the norm.
        backend: as for :func:`layer_norm`.

    Returns:
        The sum in x's dtype, rounded once, and the norm of what was not yet rounded.

    Raises:
        ValueError, BackendError: as :func:`layer_norm`.
    """
    check(x, weight, bias)
    if branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}; expected {tuple(x.shape)}")
    why_not = why_not_triton(x, weight, bias, branch, dtype=dtype)
    if why_not is None and torch.is_grad_enabled():
        why_not = "gradients are on, and this operation has none"
    if choose_backend(backend, why_not) == "reference":
        return add_layer_norm_reference(x, branch, weight, bias, eps, dtype)
    with on_device(x):
        normal, _, total = _launch().forward(x, weight, bias, eps, dtype, branch=branch)
    return total, normal


def _launch():
    """The kernels: Triton is imported with the first call."""
    from . import triton_kernels as layer_norm_triton

    return layer_norm_triton


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, dtype):
        with on_device(x):
            y, stats, _ = _launch().forward(x, weight, bias, eps, dtype, save=True)
        ctx.save_for_backward(x, weight, stats)
        ctx.sums_dtype = common_dtype(weight, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        needs = ctx.needs_input_grad[:3]
        return *gradients(g, *ctx.saved_tensors, needs, ctx.sums_dtype), None, None


def gradients(
    g: Tensor, x: Tensor, weight: Tensor, stats: Tensor, needs, sums_dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Those of x, weight and bias, ``None`` where ``needs`` has none.

    Args:
        g: of the output.
        stats: what the forward saved of rows.
        needs: three booleans.
        sums_dtype: of the gradients of weight and bias.
    """
    need_x, need_weight, need_bias = needs
    dweight = dbias = parts = None
    launch = _launch()
    with on_device(g), without_autocast(g):
        if need_weight or need_bias:
            parts = launch.new_parts(x, 2 * weight.numel())
        dx = launch.backward(g, x, weight, stats, need_x=need_x, parts=parts)
        if parts is not None:
            dweight, dbias = launch.reduce(parts, sums_dtype).chunk(2)
    return dx, dweight if need_weight else None, dbias if need_bias else None


def default_dtype(x: Tensor) -> torch.dtype:
    """Of a norm's output where nobody asks for another: PyTorch's policy."""
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of all, else fp32: gradients leave in it, and autograd casts where they differ."""
    first = tensors[0].dtype
    return first if all(t.dtype == first for t in tensors) else torch.float32


def why_not_triton(x: Tensor, *parameters: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why the kernels cannot take x [..., C] and parameters, or write ``dtype``; ``None`` if they
    can."""
    reason = why_not_device(x)
    if reason is not None:
        return reason
    where = x.get_device()  # a number: devices themselves take longer to compare
    for t in (x, *parameters):
        if t.dtype not in DTYPES:
            return f"dtype {t.dtype}; the kernels take float32, bfloat16 and float16"
        if t.get_device() != where:
            return f"tensors on {x.device} and {t.device}"
        if type(t) not in PLAIN:
            return f"a {type(t).__name__}; the kernels take plain tensors"
    if x.numel() == 0:
        return f"x is empty: {tuple(x.shape)}"
    if not MIN_WIDTH <= x.shape[-1] <= MAX_WIDTH:
        return f"{x.shape[-1]} channels; the kernels take {MIN_WIDTH} to {MAX_WIDTH}"
    if x.numel() // x.shape[-1] >= 2**31 - 2**20:
        return f"{x.numel() // x.shape[-1]} rows; the kernels take fewer than 2³¹"
    return None if dtype in (None, *DTYPES) else f"output in {dtype}"


def check(
    x: Tensor, weight: Tensor, bias: Tensor, names: tuple[str, str] = ("weight", "bias")
) -> None:
    """Raises ValueError for shapes that do not fit."""
    width = x.shape[-1] if x.dim() else None
    for name, t in zip(names, (weight, bias), strict=True):
        if tuple(t.shape) != (width,):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; expected [C={width}] for x {tuple(x.shape)}"
            )
