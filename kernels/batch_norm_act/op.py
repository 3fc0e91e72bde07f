"""Batch norm in training with an activation as a function: backends, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import choose_backend, on_device, why_not_device, without_autocast
from .reference import ACTIVATIONS, batch_norm_act_reference

# Numbers of pixels are not specialized: all multiples of 64 share their kernels.
_LIKE_MOST = (1, 1, 64, 64)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
    *,
    backend: str = "auto",
) -> Tensor:
    """Normalize each channel by the batch's mean and variance, then apply the activation.

    The activation costs no pass over memory of its own, forward or backward.

    Args:
        x: [B, C, H, W]; fp32, bf16 or fp16. It is read with the channels last, and copied where it
            lies otherwise.
        weight, bias: [C], of any of these dtypes.
        running_mean, running_var: [C] fp32, both or neither; updated in place.
        momentum: the share of this batch in the running statistics.
        eps: added to the variance.
        activation: ``"none"``, ``"relu"``, ``"relu6"`` or ``"silu"``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        As ``x``, with the channels last.

    Raises:
        ValueError: shapes do not fit; one value a channel; unknown activation or backend.
        BackendError: ``"triton"`` was asked for and cannot run this call.
    """
    _check(x, weight, bias, running_mean, running_var, activation)
    chosen = choose_backend(backend, why_not_triton(x, weight, bias, running_mean, running_var))
    if chosen == "reference":
        return batch_norm_act_reference(
            x, weight, bias, running_mean, running_var, momentum, eps, activation
        )
    return _BatchNormAct.apply(
        x, weight, bias, running_mean, running_var, momentum, eps, activation
    )


def why_not_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> str | None:
    """Return why the kernels cannot run this call; ``None`` if they can."""
    reason = why_not_device(x)
    if reason is not None:
        return reason
    if any(t.dtype not in _DTYPES for t in (x, weight, bias)):
        return f"dtypes {x.dtype}, {weight.dtype}; the kernels take float32, bfloat16 and float16"
    for running in (running_mean, running_var):
        if running is not None and running.dtype != torch.float32:
            return f"running statistics in {running.dtype}; the kernels take float32"
    return None


def compile_batch_norm_act(
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> None:
    """Begin to compile what calls and their backward will launch on the current GPU.

    Args:
        weight, bias, running_mean, running_var, activation: as for :func:`batch_norm_act`; of the
            tensors only shapes and dtypes are read.
        dtype: of x.
    """
    from . import launches

    weight, bias = weight.detach().to("meta"), bias.detach().to("meta")
    running = None
    if running_mean is not None and running_var is not None:
        running = running_mean.to("meta"), running_var.to("meta")
    x = torch.empty(_LIKE_MOST, dtype=dtype, device="meta").expand(-1, len(weight), -1, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    y, channels = launches.forward(x, weight, bias, running, 0.1, 1e-5, activation)
    launches.backward(y, x, channels, weight, bias, activation)


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, activation):
        from . import launches

        x = x.contiguous(memory_format=torch.channels_last)
        running = None if running_mean is None else (running_mean, running_var)
        with on_device(x), without_autocast(x):
            y, channels = launches.forward(x, weight, bias, running, momentum, eps, activation)
        ctx.save_for_backward(x, channels, weight, bias)
        ctx.activation = activation
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        from . import launches

        x, channels, weight, bias = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        with on_device(g), without_autocast(g):
            dx, dw, db = launches.backward(g, x, channels, weight, bias, ctx.activation)
        return dx, dw, db, None, None, None, None, None


def _check(x, weight, bias, running_mean, running_var, activation) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, C, H, W]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: expected both, or neither")
    channels = x.shape[1]
    for name, t in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        if t is not None and t.shape != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; expected [C={channels}] for x {tuple(x.shape)}"
            )
    if x.numel() <= channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected more than one value a channel")
