"""Run the depthwise convolutions of a backbone with our kernels, in half precision on a GPU.

cuDNN plans such a layer anew for each size of a batch, in a tenth of a second forward and half a
second backward; with these kernels the first step of a training and its last, smaller batch cost
what any other costs. No module is changed: calls of ``conv2d`` are taken over within a context.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastadapt.kernels import depthwise_conv2d
from fastadapt.kernels.common.dispatch import compute_dtype

_NOTHING = contextlib.nullcontext()
_has_depthwise: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def depthwise_convolutions(model: nn.Module, x: Tensor) -> contextlib.AbstractContextManager:
    """Make the context in which ``model(x)`` runs its depthwise convolutions with our kernels.

    Args:
        model: asked once whether it has any.
        x: its input; on a CPU, in fp32 and under ``torch.compile`` the context does nothing.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or compute_dtype(x) not in _HALF:
        return _NOTHING
    if model not in _has_depthwise:
        _has_depthwise[model] = any(
            isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
            for module in model.modules()
        )
    return _Mode() if _has_depthwise[model] else _NOTHING


_HALF = (torch.bfloat16, torch.float16)


class _Mode(TorchFunctionMode):
    """Take over the calls of ``conv2d`` that are depthwise."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and not kwargs:
            ours = _arguments(*args)
            if ours is not None:
                return depthwise_conv2d(*ours)
        return func(*args, **kwargs)


def _arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, int, int] | None:
    """Return what our operation takes of a call of ``conv2d``; ``None`` if it is another one."""
    channels = weight.shape[0]
    if not (x.dim() == 4 and groups == channels == x.shape[1] > 1 and x.is_cuda):
        return None
    if weight.shape[2] != weight.shape[3] or compute_dtype(x) not in _HALF:
        return None
    step, border = _single(stride), _single(padding)
    if step is None or border is None or _single(dilation) != 1:
        return None
    return x, weight, bias, step, border


def _single(value: Any) -> int | None:
    """Return the number that both axes have; ``None`` if they differ, or it is a word."""
    if isinstance(value, int):
        return value
    if isinstance(value, tuple | list) and len(set(value)) == 1 and isinstance(value[0], int):
        return value[0]
    return None
