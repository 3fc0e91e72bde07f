"""The blocks of a frozen vision transformer in half precision, with fewer passes over memory.

Under autocast PyTorch takes a block apart: LayerNorm writes fp32, which the product behind it
rounds; GELU and both residual sums are passes of their own; and weights that need no gradient are
rounded in every call. Without gradients a residual sum and the LayerNorm behind it are one pass,
GELU is part of the product in front of it (on Hopper), and rounded weights are kept. The residual
stream keeps its dtype, fp32 under autocast.

timm's vision transformers have such blocks, with or without layer scale (DINOv2's). Any other
block, one that was changed, or one with hooks runs as ever.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.kernels.dispatch import compute_dtype, why_not_device
from fastadapt.kernels.layer_norm import add_layer_norm, layer_norm
from fastadapt.kernels.residual_mlp import linear_gelu
from fastadapt.layers.plain import is_plain

HALF = (torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """A LayerNorm's parameters, in their own dtype."""

    weight: Tensor
    bias: Tensor
    eps: float


class Linear(NamedTuple):
    """A linear layer's parameters in half precision, a layer scale behind it multiplied in."""

    weight: Tensor
    bias: Tensor


class Block(NamedTuple):
    norm1: Norm
    attn: nn.Module
    norm2: Norm
    fc1: Linear
    fc2: Linear


class FrozenBlocks:
    """Stands for timm's blocks of a vision transformer where no gradients are asked for.

    Args:
        blocks: for which :func:`why_not` has no reason.
        dtype: of the products, bf16 or fp16. Weights in another one are copied.
    """

    def __init__(self, blocks: nn.Sequential, dtype: torch.dtype):
        self.dtype = dtype
        # Tensors that inference mode makes could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            self.blocks = [_block(block, dtype) for block in blocks]

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] through all blocks; in x's dtype."""
        branch = None
        for norm1, attn, norm2, fc1, fc2 in self.blocks:
            if branch is None:
                normal = layer_norm(x, *norm1, dtype=self.dtype)
            else:
                x, normal = add_layer_norm(x, branch, *norm1, self.dtype)
            x, normal = add_layer_norm(x, attn(normal), *norm2, self.dtype)
            branch = F.linear(linear_gelu(normal, *fc1), *fc2)
        return x if branch is None else x + branch


def _block(block: nn.Module, dtype: torch.dtype) -> Block:
    attn = block.attn
    scale = getattr(block.ls1, "gamma", None)
    if scale is not None or attn.qkv.weight.dtype != dtype:
        attn = copy.deepcopy(attn).requires_grad_(False)
        if scale is not None:
            proj = _linear(attn.proj, torch.float32, scale)
            attn.proj.weight.data, attn.proj.bias.data = proj
        attn.to(dtype)
    mlp = block.mlp
    return Block(
        _norm(block.norm1),
        attn,
        _norm(block.norm2),
        _linear(mlp.fc1, dtype),
        _linear(mlp.fc2, dtype, getattr(block.ls2, "gamma", None)),
    )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)


def _linear(linear: nn.Linear, dtype: torch.dtype, scale: Tensor | None = None) -> Linear:
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if scale is not None:
        scale = scale.float()
        weight, bias = scale[:, None] * weight.float(), scale * bias.float()
    return Linear(weight.to(dtype), bias.to(dtype))


def why_not(blocks: nn.Module) -> str | None:
    """Why :class:`FrozenBlocks` cannot stand for these blocks; ``None`` if it can."""
    if type(blocks) is not nn.Sequential or not len(blocks):
        return f"a {type(blocks).__name__}; expected an nn.Sequential of timm's blocks"
    if nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    from timm.layers import LayerNorm, Mlp
    from timm.models import vision_transformer as vit

    norms = {nn.LayerNorm, LayerNorm}
    idle = {nn.Identity, nn.Dropout}
    # Parts that other modules would hold, and the classes that we compute the same as.
    expected = {
        vit.Block: {
            "norm1": norms,
            "attn": {vit.Attention},
            "ls1": {nn.Identity, vit.LayerScale},
            "drop_path1": {nn.Identity, vit.DropPath},
            "norm2": norms,
            "mlp": {Mlp},
            "ls2": {nn.Identity, vit.LayerScale},
            "drop_path2": {nn.Identity, vit.DropPath},
        },
        vit.Attention: {"qkv": {nn.Linear}, "proj": {nn.Linear}},
        Mlp: {"fc1": {nn.Linear}, "fc2": {nn.Linear}, "act": {nn.GELU}},
    }
    for name, module in blocks.named_modules():
        parts = expected.get(type(module), {})
        for part, child in module.named_children():
            if module is not blocks and type(child) not in parts.get(part, idle):
                return f"block {name} has a {type(child).__name__} as {part}"
            if module is blocks and type(child) is not vit.Block:
                return f"block {part} is a {type(child).__name__}"
        if module is not blocks and not is_plain(module):
            return f"{name} has hooks, another forward or no bias"
        if module.training:
            return f"{name} is in training mode"
        if type(module) is nn.GELU and module.approximate != "none":
            return f"{name} approximates GELU"
        if getattr(module, "gate", None) is not None:
            return f"{name} has a gate"
    return None


# What was made for blocks, with the state of their parameters then.
_made: WeakKeyDictionary[nn.Module, tuple[tuple, FrozenBlocks]] = WeakKeyDictionary()


def frozen_blocks(blocks: nn.Module, dtype: torch.dtype) -> FrozenBlocks | None:
    """What stands for the blocks, made once and again when a parameter has changed."""
    if why_not(blocks) is not None:
        return None
    state = (dtype, *[(p.data_ptr(), p._version, p.dtype) for p in blocks.parameters()])
    made = _made.get(blocks)
    if made is None or made[0] != state:
        made = None
        _made.pop(blocks, None)  # before the next takes memory
        made = _made[blocks] = (state, FrozenBlocks(blocks, dtype))
    return made[1]


def forget(backbone: nn.Module) -> None:
    """Frees what was kept for a backbone that trains from now on."""
    _made.pop(getattr(backbone, "blocks", backbone), None)


def _covered(x: Tensor) -> bool:
    return why_not_device(x) is None and not torch.compiler.is_compiling()


@contextlib.contextmanager
def fused_blocks(backbone: nn.Module, images: Tensor) -> Iterator[None]:
    """Within it, without gradients, a backbone's blocks run as :class:`FrozenBlocks`.

    Nothing changes for backbones without such blocks, on a CPU, in full precision, and while
    PyTorch compiles or exports.
    """
    blocks = getattr(backbone, "blocks", None)
    stand_in = None
    if isinstance(blocks, nn.Module) and _covered(images) and not torch.is_grad_enabled():
        parameter = next(blocks.parameters(), images)
        dtype = compute_dtype(parameter)
        if dtype in HALF:
            stand_in = frozen_blocks(blocks, dtype)
    if stand_in is None:
        yield
        return
    blocks.forward = stand_in
    try:
        yield
    finally:
        blocks.__dict__.pop("forward", None)
