"""The depthwise convolution as a function: backends, autograd.

cuDNN builds an execution plan for each shape that it has not seen, which takes a depthwise layer
0.1 s forward and 0.5 s backward on an H100: half a minute for a small network in which batches of
two sizes train. These kernels are compiled once for each filter size and stride, and kept on disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.arithmetic import ceil_div
from ..common.dispatch import (
    choose_backend,
    compute_dtype,
    on_device,
    why_not_device,
    without_autocast,
)
from .reference import depthwise_conv2d_reference

LARGEST_FILTER = 9
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heights are not specialized: images of any size from some 12 pixels on share their kernels.
_LIKE_MOST = (1, 1, 64, 64)
_WEIGHT_PROGRAMS = 1056  # of the weight's gradient: several on each multiprocessor


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    *,
    padding_end: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with a filter of its own; the result has the channels last.

    Args:
        x: [B, C, H, W]; fp32, bf16 or fp16. It is read with the channels last, and copied where it
            lies otherwise.
        weight: [C, 1, K, K], of any of these dtypes; its gradient has the same, summed in fp32.
        bias: [C] or ``None``.
        stride: of both axes, 1 or more.
        padding: zeros on each side of both axes, 0 or more.
        padding_end: zeros after the last row and column, where there are more or fewer than before
            the first ("same" padding of an even size with a stride of 2, say).
        backend: ``"auto"``, ``"triton"`` or ``"reference"``; under autocast both compute in its
            dtype.

    Returns:
        [B, C, H', W'], H' = (H + padding + padding_end - K) // stride + 1.

    Raises:
        ValueError: shapes do not fit; unknown backend.
        BackendError: ``"triton"`` was asked for and cannot run this call.
    """
    end = padding if padding_end is None else padding_end
    _check(x, weight, bias, stride, (padding, end))
    dtype = compute_dtype(x)
    chosen = choose_backend(backend, why_not_triton(x, weight, dtype))
    x = x.to(dtype)
    if chosen == "reference":
        with without_autocast(x):
            return depthwise_conv2d_reference(x, weight, bias, stride, padding, end)
    return _DepthwiseConv.apply(x, weight, bias, stride, (padding, end))


def why_not_triton(x: Tensor, weight: Tensor, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run this call; ``None`` if they can."""
    reason = why_not_device(x)
    if reason is not None:
        return reason
    if dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"dtypes {dtype} and {weight.dtype}; the kernels take float32, bfloat16 and float16"
    if weight.shape[2] > LARGEST_FILTER:
        return f"a filter of {weight.shape[2]} × {weight.shape[3]}; the kernels take up to 9 × 9"
    if x.numel() == 0:
        return f"x is empty: {tuple(x.shape)}"
    if x[0].numel() >= 2**31:
        return f"{x[0].numel()} values in an image; the kernels take fewer than 2³¹"
    return None


def compile_depthwise_conv2d(
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    *,
    gradients: bool,
) -> None:
    """Begin to compile what calls with such a weight will launch on the current GPU.

    Args:
        weight, bias: as for :func:`depthwise_conv2d`; of them only shapes and dtypes are read.
        stride, padding: as there.
        dtype: that the calls compute in.
        gradients: compile the backward, too.
    """
    weight = weight.detach().to("meta")
    bias = None if bias is None else bias.detach().to("meta")
    x = torch.empty(_LIKE_MOST, dtype=dtype, device="meta").expand(-1, len(weight), -1, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    g = _forward(x, weight, bias, stride, (padding, padding))
    if gradients:
        _input_gradient(g, x, weight, stride, padding)
        _weight_gradient(g, x, weight, stride, padding)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        ctx.bias_dtype = None if bias is None else bias.dtype
        with on_device(x), without_autocast(x):
            return _forward(x, weight, bias, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        g = g.contiguous(memory_format=torch.channels_last)
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx = dw = db = None
        with on_device(g), without_autocast(g):
            if needs_x:
                dx = _input_gradient(g, x, weight, ctx.stride, ctx.padding[0])
            if needs_weight:
                dw = _weight_gradient(g, x, weight, ctx.stride, ctx.padding[0])
            if needs_bias:
                wide = torch.float64 if g.dtype == torch.float32 else torch.float32
                db = g.sum((0, 2, 3), dtype=wide).to(ctx.bias_dtype)
        return dx, dw, db, None, None


def _out_size(size: int, k: int, stride: int, padding: tuple[int, int]) -> int:
    return (size + sum(padding) - k) // stride + 1


def _tile(channels: int, narrow: int = 32) -> tuple[int, int]:
    """Return how many strips and channels a program computes: a thread has 8 or 4 channels.

    Args:
        channels: of the image.
        narrow: strips where there are few channels.
    """
    return (8, 64) if channels > 32 else (narrow, 32)


def _taps_first(weight: Tensor) -> Tensor:
    """Return the weight as [K·K, C], so that the channels of a tap are read as one line."""
    return weight.flatten(1).t().contiguous()


def _forward(x, weight, bias, stride, padding):
    _, _, height, width = x.shape
    k = weight.shape[2]
    size = tuple(_out_size(n, k, stride, padding) for n in (height, width))
    return _correlate(x, weight, bias, size, stride, padding[0])


def _correlate(x, weight, bias, size, stride, padding, taps_reversed=False):
    """Compute equation (1) of the kernels for outputs of a size."""
    from ..common.direct_launch import launch
    from . import triton_kernels as kernels

    batch, channels, height, width = x.shape
    y = torch.empty(
        (batch, channels, *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    strips = size[0] * ceil_div(size[1], kernels.STRIP)
    rows, cols = _tile(channels)
    launch(
        kernels.forward_kernel,
        (ceil_div(strips, rows), ceil_div(channels, cols), batch),
        x,
        _taps_first(weight),
        weight if bias is None else bias,
        y,
        height,
        width,
        *size,
        channels,
        K=weight.shape[2],
        S=stride,
        P=padding,
        REVERSED=taps_reversed,
        BIAS=bias is not None,
        BN=rows,
        BC=cols,
        num_warps=4,
    )
    return y


def _input_gradient(g, x, weight, stride, padding):
    from ..common.direct_launch import launch
    from . import triton_kernels as kernels

    batch, channels, height, width = x.shape
    k = weight.shape[2]
    if stride == 1:
        return _correlate(g, weight, None, (height, width), 1, k - 1 - padding, taps_reversed=True)
    dx = torch.empty_like(x)
    pixels = ceil_div(height, stride) * ceil_div(width, stride)
    rows, cols = 32 if pixels >= 32 else 16, 64 if channels > 32 else 32
    grid = (ceil_div(pixels, rows), ceil_div(channels, cols), batch * stride * stride)
    launch(
        kernels.input_gradient_kernel,
        grid,
        g,
        _taps_first(weight),
        dx,
        height,
        width,
        *g.shape[2:],
        channels,
        stride,
        K=k,
        S=stride,
        P=padding,
        BP=rows,
        BC=cols,
        num_warps=4,
    )
    return dx


def _weight_gradient(g, x, weight, stride, padding):
    from ..common.direct_launch import launch
    from . import triton_kernels as kernels

    batch, channels, height, width = x.shape
    k = weight.shape[2]
    strips = g.shape[2] * ceil_div(g.shape[3], kernels.STRIP)
    rows, cols = _tile(channels, narrow=16)
    blocks = ceil_div(channels, cols) * k
    parts = max(1, min(batch * ceil_div(strips, rows), _WEIGHT_PROGRAMS // blocks))
    sums = torch.empty((parts, k * k, channels), dtype=torch.float32, device=x.device)
    launch(
        kernels.weight_gradient_kernel,
        (parts, ceil_div(channels, cols), k),
        g,
        x,
        sums,
        batch,
        height,
        width,
        *g.shape[2:],
        channels,
        K=k,
        S=stride,
        P=padding,
        BN=rows,
        BC=cols,
        num_warps=4,
    )
    return sums.sum(0).t().reshape(weight.shape).to(weight.dtype)


def _check(x, weight, bias, stride, padding) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [B, C, H, W]")
    channels = x.shape[1]
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1) or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected [C={channels}, 1, K, K] "
            f"for x {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected [C={channels}]")
    if stride < 1 or min(padding) < 0:
        raise ValueError(
            f"stride is {stride} and padding {padding[0]} and {padding[1]}; expected 1 or more, "
            "and 0 or more"
        )
    k = weight.shape[2]
    if min(x.shape[2:]) + sum(padding) < k:
        raise ValueError(
            f"x {tuple(x.shape)} with padding {padding[0]} and {padding[1]} is smaller than the "
            f"filter, {k} × {k}"
        )
