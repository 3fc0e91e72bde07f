"""Weights of fused layers: norms, scales and normalisation folded in, in fp64, rounded once."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from fastadapt.kernels.patch_embedding.reference import CENTER


class Linear(NamedTuple):
    """A linear layer's weight [N, C] and bias [N], in fp64."""

    weight: Tensor
    bias: Tensor

    @property
    def vectors(self) -> Tensor:
        """Return the bias in fp32, in which kernels add it."""
        return self.bias.float()


def linear(layer: nn.Linear | nn.Conv2d, scale: Tensor | None = None) -> Linear:
    """Return a layer's weight and bias, times the layer scale after it."""
    weight = layer.weight.detach().double().flatten(1)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    if scale is not None:
        scale = scale.detach().double()
        weight, bias = scale[:, None] * weight, scale * bias
    return Linear(weight, bias)


def after_norm(layer: Linear, norm: nn.LayerNorm, repeats: int = 1) -> Linear:
    """Put the weight and bias of the LayerNorm before a linear layer into it.

    Args:
        layer: its columns are ``repeats`` times the norm's channels.
        norm: with weight and bias.
        repeats: positions of a filter.
    """
    weight, bias = (t.detach().double().repeat(repeats) for t in (norm.weight, norm.bias))
    return Linear(layer.weight * weight, layer.bias + layer.weight @ bias)


def is_of_patches(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Tell whether a layer is a convolution of patches that neither overlap nor are padded."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == layer.stride
        and len(set(layer.stride)) == 1
        and layer.padding == (0, 0)
        and layer.dilation == (1, 1)
        and layer.groups == 1
    )


def filters_as_rows(conv: nn.Conv2d) -> Linear:
    """Return a convolution's weight as [C, P·P·D], in the order rows, columns, channels."""
    weight = conv.weight.detach().double().permute(0, 2, 3, 1).flatten(1)
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
    return Linear(weight, bias)


def for_bytes(layer: Linear, mean: Tensor, std: Tensor) -> Linear:
    """Put (x / 255 − mean) / std of bytes x into a layer that takes x − 128.

    Args:
        layer: [C, P·P·D], channels last.
        mean, std: [D].
    """
    mean, std = (t.detach().double().flatten() for t in (mean, std))
    repeats = layer.weight.shape[1] // len(mean)
    level = ((CENTER / 255 - mean) / std).repeat(repeats)
    weight = layer.weight / (255 * std).repeat(repeats)
    return Linear(weight, layer.bias + layer.weight @ level)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a weight to the model's dtype."""
    return tensor.detach().to(dtype).contiguous()
