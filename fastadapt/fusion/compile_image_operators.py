"""Compile the kernels of a backbone's convolutions and batch norms before they are launched.

What :mod:`fastadapt.fusion.image_operators` launches follows from the modules, since neither
heights nor batch sizes are specialized: nothing is run to find it out. EfficientNet-Lite0, with 49
batch norms and 16 depthwise convolutions, needs 30 kernels. One that was not foreseen compiles at
its first launch, as does one whose compilation fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastadapt.fusion.image_operators import activation_of


def compile_image_operators(backbone: nn.Module, dtype: torch.dtype, training: bool) -> list[Any]:
    """Begin to compile what a backbone will launch on the current GPU.

    Args:
        backbone: on any device; only its modules' settings, shapes and dtypes are read.
        dtype: autocast's.
        training: whether it will train.

    Returns:
        The threads that compile.
    """
    if not _has_any(backbone, training):
        return []
    from fastadapt.kernels.common.direct_launch import compiled_by

    return compiled_by(lambda: _call_all(backbone, dtype, training))


def _call_all(backbone: nn.Module, dtype: torch.dtype, training: bool) -> None:
    """Call the operations of all layers, that only compile."""
    from fastadapt.kernels.batch_norm_act.op import compile_batch_norm_act
    from fastadapt.kernels.depthwise_conv.op import compile_depthwise_conv2d

    for conv in _depthwise(backbone):
        for padding in _paddings(conv):
            compile_depthwise_conv2d(
                conv.weight, conv.bias, conv.stride[0], padding, dtype, gradients=training
            )
    for norm in _norms(backbone) if training else ():
        compile_batch_norm_act(
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            activation_of(norm),
            dtype,
        )


def _has_any(backbone: nn.Module, training: bool) -> bool:
    return any(True for _ in _depthwise(backbone)) or (
        training and any(True for _ in _norms(backbone))
    )


def _depthwise(backbone: nn.Module) -> Iterator[nn.Conv2d]:
    from fastadapt.kernels.depthwise_conv.op import LARGEST_FILTER

    for module in backbone.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.groups == module.in_channels == module.out_channels > 1
            and all(len(set(sizes)) == 1 for sizes in (module.kernel_size, module.stride))
            and module.kernel_size[0] <= LARGEST_FILTER
            and set(module.dilation) == {1}
            and not isinstance(module.padding, str)
            and len(set(module.padding)) == 1
        ):
            yield module


def _paddings(conv: nn.Conv2d) -> list[int]:
    """Return how much padding may come before the first row: of "same" it depends on the size."""
    from timm.layers import Conv2dSame

    if not isinstance(conv, Conv2dSame):
        assert not isinstance(conv.padding, str)
        return [conv.padding[0]]
    size, step = conv.kernel_size[0], conv.stride[0]
    return sorted({max(size - 1 - excess, 0) // 2 for excess in range(step)})


def _norms(backbone: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d) and m.affine)
