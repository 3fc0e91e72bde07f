"""Apply activations within the convolutions before them, for inference on a CPU.

oneDNN applies an activation to a block of a convolution's output while a core's cache holds it; as
a module of its own it passes over memory once more, which takes a CPU a third of the time of a
small network.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.fusion.batch_norm import TOLERANCE
from fastadapt.fusion.readers import readers


class _Activation(NamedTuple):
    """An activation in oneDNN's words: name, numbers, algorithm."""

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str | None = ""


_NAMES: dict[type[nn.Module], _Activation] = {
    nn.ReLU: _Activation("relu"),
    nn.ReLU6: _Activation("hardtanh", (0.0, 6.0)),
    nn.SiLU: _Activation("swish"),
    nn.Hardswish: _Activation("hardswish"),
}


@torch.inference_mode()
def fuse_activations(model: AdaptedModel, example: Tensor) -> AdaptedModel:
    """Return a copy of a model whose frozen backbone's convolutions apply their activations.

    Which activation reads which convolution's output is observed during one forward pass. Where
    PyTorch has no oneDNN, where there is nothing to fuse, and if the features change, the model
    itself is returned.

    Args:
        model: its backbone in evaluation mode, on a CPU and in fp32.
        example: images [B, C, H, W] fp32; one is enough.
    """
    if not torch.backends.mkldnn.is_available():
        return model
    fused = copy.deepcopy(model)
    pairs = _pairs(fused, example)
    if not pairs:
        return model
    for parent in list(fused.backbone.modules()):
        for name, child in list(parent.named_children()):
            if child in pairs:
                setattr(parent, name, _Convolution(child, _NAMES[type(pairs[child])]))
            elif child in pairs.values():
                setattr(parent, name, nn.Identity())
    want = model.backbone_features(example)
    try:
        got = fused.backbone_features(example)
    except (RuntimeError, AttributeError):  # another version's oneDNN, or none for this layer
        return model
    close = (got - want).abs().max() <= TOLERANCE * want.abs().max()
    return fused if close else model


class _Convolution(nn.Module):
    """A convolution with its activation."""

    def __init__(self, conv: nn.Conv2d, activation: _Activation):
        super().__init__()
        self.conv = conv
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and activate x [B, C, H, W]."""
        from timm.layers import Conv2dSame
        from timm.layers.padding import pad_same

        conv, padding = self.conv, self.conv.padding
        if isinstance(conv, Conv2dSame):
            kernel, stride, dilation = map(list, (conv.kernel_size, conv.stride, conv.dilation))
            x, padding = pad_same(x, kernel, stride, dilation), (0, 0)
        return torch.ops.mkldnn._convolution_pointwise(
            x,
            conv.weight,
            conv.bias,
            padding,
            conv.stride,
            conv.dilation,
            conv.groups,
            *self.activation,
        )


def _pairs(model: AdaptedModel, example: Tensor) -> dict[nn.Module, nn.Module]:
    """Map convolutions to the activations that read their output; each is called exactly once."""
    from timm.layers import Conv2dSame

    def is_convolution(module: nn.Module) -> bool:
        return type(module) in (nn.Conv2d, Conv2dSame) and module.padding_mode == "zeros"

    pairs, calls = readers(model, example, is_convolution, lambda m: type(m) in _NAMES)
    return {
        conv: activation
        for activation, conv in pairs.items()
        if calls[conv] == calls[activation] == 1 and not isinstance(conv.padding, str)
    }
