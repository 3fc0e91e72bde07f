"""The residual MLP of a CLAdapter block: residual + fc2(gelu(fc1(x))), exact GELU.

On Hopper in half precision, GELU and the residual ride on the two products instead of passing
over the hidden layer again; everywhere else PyTorch's own layers do it, and torch.compile sees
those.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.kernels.dispatch import choose_backend, compute_dtype, on_device, without_autocast


def residual_mlp_reference(
    x: Tensor,
    residual: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> Tensor:
    """The same in plain PyTorch; arguments as :func:`residual_mlp`."""
    return residual + F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def residual_mlp(
    x: Tensor,
    residual: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """``residual + fc2(gelu(fc1(x)))``, exact GELU.

    For the backward, x and the hidden layer before and after GELU are saved, as PyTorch does.

    Args:
        x, residual: [..., C].
        weight1, bias1: [H, C], [H].
        weight2, bias2: [C, H], [C].
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        [..., C], in the dtype that PyTorch's own layers would give.

    Raises:
        BackendError: ``backend="triton"`` and the kernels do not cover the call.
    """
    args = (x, residual, weight1, bias1, weight2, bias2)
    if torch.compiler.is_compiling():
        return residual_mlp_reference(*args)
    if choose_backend(backend, _why_not_triton(x, residual, weight1, weight2)) == "reference":
        return residual_mlp_reference(*args)
    dtype = compute_dtype(x)
    shape = residual.shape
    args = (
        x.to(dtype).reshape(-1, x.shape[-1]),
        residual.reshape(-1, shape[-1]),
        weight1.to(dtype),
        bias1,
        weight2.to(dtype),
        bias2,
    )
    return _Function.apply(*args).view(shape)


def _why_not_triton(x, residual, weight1, weight2) -> str | None:
    dtype = compute_dtype(x)
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device.index)[0] != 9:
        return f"the MLP's kernels are for Hopper GPUs; x is on {x.device}"
    if dtype not in (torch.bfloat16, torch.float16) or residual.dtype != dtype:
        return f"dtypes {dtype} and {residual.dtype}; the MLP's kernels take one half type"
    if weight1.shape[0] % 8 or weight1.shape[1] % 8:
        return f"sizes {tuple(weight1.shape)}; the MLP's kernels take multiples of 8"
    multiprocessors = torch.cuda.get_device_properties(x.device.index).multi_processor_count
    if x.numel() // x.shape[-1] // 128 * -(-weight2.shape[0] // 256) < multiprocessors:
        return f"x {tuple(x.shape)} is too small to fill the GPU with the MLP's kernels"
    if _gluon() is None:
        return "this Triton has another Gluon than the MLP's kernels need"
    return None


@functools.lru_cache
def _gluon():
    try:
        from fastadapt.kernels import mlp_gluon
    except (ImportError, AttributeError):
        return None
    return mlp_gluon


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight1, bias1, weight2, bias2):
        save = any(ctx.needs_input_grad)
        with on_device(x), without_autocast(x):
            x = x.contiguous()
            weight1, weight2 = weight1.contiguous(), weight2.contiguous()
            before = x.new_empty(x.shape[0], weight1.shape[0]) if save else None
            hidden = _linear(x, weight1, bias1, gelu=True, before=before)
            y = _linear(hidden, weight2, bias2, residual=residual.contiguous())
        if save:
            ctx.save_for_backward(x, weight1, weight2, before, hidden)
            ctx.bias_dtypes = bias1.dtype, bias2.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight1, weight2, before, hidden = ctx.saved_tensors
        need_x, need_residual, need1, need_bias1, need2, need_bias2 = ctx.needs_input_grad
        dx = d1 = d_bias1 = d2 = d_bias2 = None
        with on_device(x), without_autocast(x):
            g = g.contiguous()
            if need2:
                d2 = g.t() @ hidden
            if need_bias2:
                d_bias2 = g.sum(0, dtype=torch.float32).to(ctx.bias_dtypes[1])
            if need_x or need1 or need_bias1:
                sums = x.new_empty(-(-x.shape[0] // 128) * 2, hidden.shape[1], dtype=torch.float32)
                d_before = _linear(g, weight2, None, transposed=True, derivative=before, sums=sums)
                if need_x:
                    dx = d_before @ weight1
                if need1:
                    d1 = d_before.t() @ x
                if need_bias1:
                    d_bias1 = sums.sum(0).to(ctx.bias_dtypes[0])
        return dx, g if need_residual else None, d1, d_bias1, d2, d_bias2


def _linear(
    x,
    weight,
    bias,
    *,
    transposed=False,
    gelu=False,
    before=None,
    residual=None,
    derivative=None,
    sums=None,
):
    """x [M, K] times weight ([N, K], or [K, N] if transposed) plus bias, then the epilogue."""
    from fastadapt.kernels.launch import device_of, gluon_descriptor, launch

    rows, depth = x.shape
    cols = weight.shape[1 if transposed else 0]
    out = x.new_empty(rows, cols)
    tiles_n = -(-cols // 256)
    tiles = -(-rows // 128) * tiles_n
    device = device_of(x.device.index)
    extra = residual if derivative is None else derivative
    box = [64, 256]
    launch(
        _gluon().linear_kernel,
        (min(tiles, device.multiprocessors),),
        device,
        gluon_descriptor(x, [64, 64]),
        gluon_descriptor(weight, [64, 256] if transposed else [256, 64]),
        gluon_descriptor(out, box),
        None if extra is None else gluon_descriptor(extra, box),
        None if before is None else gluon_descriptor(before, box),
        bias,
        sums,
        depth,
        cols,
        tiles_n,
        tiles,
        TRANSPOSED=transposed,
        BIAS=bias is not None,
        EXTRA="before" if derivative is not None else "residual" if residual is not None else "",
        GELU=gelu,
        SAVE=before is not None,
        STAGES=3,
        warps=4,
    )
    return out
