"""FP8 after training: products of tokens and weights in e4m3, at twice bf16's rate on the GPU.

Linear layers of tokens become :class:`Float8Linear`; cluster attention and the head, where a few
numbers decide, and everything else stay in bf16. There is one scale per tensor: those run through
cuBLASLt, scales per row through slower kernels. The input's scale is set by the largest value that
the user's images give. A percentile is worse: e4m3 is a floating-point format and loses little by
a large scale, but values beyond it are cut off (relative error of a product of 768 terms whose
inputs are normal, Student's t with 3 degrees of freedom, or normal with 4 channels 100 times as
large: 0.037, 0.037, 0.038; with the 99.99th percentile 0.038, 0.126, 0.071).

torchao 0.18 is not used: its static scales for activations are a prototype, and it quantises only
on a GPU, so that neither calibration nor accuracy could be tested without one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError
from fastadapt.kernels.common.e4m3 import CAPABILITY, E4M3, LARGEST

from .half import WHOLE, MixedPrecision

MULTIPLE = 16  # both sizes of a weight are multiples of it, for the products' kernels
_TINY = 1e-12


class Float8Linear(nn.Module):
    """A linear layer with input and weight in e4m3, accumulation in fp32 and output in bf16.

    Args:
        layer: the layer to convert; its sizes are multiples of 16.
        largest: the largest magnitude of its input; larger values are cut off.

    Shape:
        [..., in_features], any floating point, to [..., out_features] in bf16.
    """

    weight: Tensor
    bias: Tensor | None
    weight_scale: Tensor
    scale: Tensor
    inverse_scale: Tensor

    def __init__(self, layer: nn.Linear, largest: float):
        super().__init__()
        weight = layer.weight.detach().float()
        weight_scale = weight.abs().amax().clamp_min(_TINY) / LARGEST
        scale = weight_scale.new_tensor(max(largest, _TINY) / LARGEST)
        bias = None if layer.bias is None else layer.bias.detach().to(torch.bfloat16)
        self.register_buffer("weight", (weight / weight_scale).to(E4M3))
        self.register_buffer("bias", bias)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("scale", scale)
        # Tensors, not constants: layers then share what Inductor writes for them.
        self.register_buffer("inverse_scale", 1 / scale)

    def forward(self, x: Tensor) -> Tensor:
        """Scale, cast and multiply."""
        # Plain operators, which Inductor fuses into the LayerNorm or GELU that x comes from.
        scaled = (x.float() * self.inverse_scale).clamp(-LARGEST, LARGEST)
        y = torch._scaled_mm(
            scaled.to(E4M3).flatten(0, -2),
            self.weight.t(),
            scale_a=self.scale,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.unflatten(0, x.shape[:-1])

    def extra_repr(self) -> str:
        """Describe the sizes, as nn.Linear does."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"


def check_gpu() -> None:
    """Raise InputError if there is no GPU with FP8 tensor cores here."""
    reason = "there is none here"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability >= CAPABILITY and torch.version.hip is None:
            return
        reason = "{} has {}.{}".format(torch.cuda.get_device_name(), *capability)
    raise InputError(
        "`fp8` needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), "
        f"and {reason}: export on a machine that has one, or leave `fp8` out"
    )


@torch.no_grad()
def quantize_fp8(
    module: MixedPrecision,
    batches: Iterable[Tensor],
    deployed: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> tuple[MixedPrecision, dict[str, float]]:
    """Copy a module with its linear layers of tokens in FP8, if their sizes are multiples of 16.

    Args:
        module: in bf16; layers that it keeps in fp32 stay so.
        batches: images that give the ranges of the layers' inputs, on the module's device.
        deployed: prepends to a module the steps that ``batches`` need.

    Returns:
        The copy, and the name of every layer in FP8 with the largest magnitude of its input.
    """
    copied = copy.deepcopy(module)
    largest: dict[str, Tensor] = {}

    def observe(name: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs and inputs[0].dim() > 2:
                found = inputs[0].abs().amax().float()
                largest[name] = torch.maximum(found, largest.get(name, found))

        return hook

    model = copied.model
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(observe(name))
        for name in _candidates(model)
    ]
    run = deployed(copied)
    for batch in batches:
        run(batch)
    for hook in hooks:
        hook.remove()
    ranges = {name: float(value) for name, value in largest.items()}
    for name, value in ranges.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, Float8Linear(layer, value))
    return copied, ranges


def _candidates(model: nn.Module) -> list[str]:
    """Return the linear layers in bf16 that FP8's products take, outside of cluster attention."""
    whole = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, WHOLE))
    return [
        name
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear
        and layer.weight.dtype == torch.bfloat16
        and not any(size % MULTIPLE for size in layer.weight.shape)
        and not name.startswith(whole)
    ]
