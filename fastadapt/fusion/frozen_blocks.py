"""The blocks of a frozen backbone in half precision, with fewer passes over memory.

Under autocast PyTorch takes a block apart: LayerNorm writes fp32, which the product behind it
rounds; GELU, layer scale and residual sums are passes of their own; and weights that need no
gradient are rounded in every call. Without gradients a residual sum and the LayerNorm behind it can
be one pass, GELU part of the product in front of it (on Hopper), a layer scale part of weights, and
rounded weights can be kept. The residual stream has the dtype that it has otherwise, mostly fp32.

This covers timm's vision transformers (with layer scale, too: DINOv2) and ConvNeXt. Any other
block, one that was changed inside, or one with hooks runs as ever.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.cuda_graph import before_replays
from fastadapt.kernels.common.dispatch import compute_dtype, why_not_device
from fastadapt.kernels.layer_norm.op import add_layer_norm, layer_norm
from fastadapt.kernels.residual_mlp.op import linear_gelu
from fastadapt.layers.plain import has_global_hooks, is_plain

HALF = (torch.bfloat16, torch.float16)

Call = Callable[[Tensor], Tensor]


class Norm(NamedTuple):
    """A LayerNorm's parameters, in their own dtype."""

    weight: Tensor
    bias: Tensor
    eps: float


class Linear(NamedTuple):
    """A linear layer's parameters in half precision, a layer scale behind it multiplied in."""

    weight: Tensor
    bias: Tensor


class TransformerBlocks:
    """timm's blocks of a vision transformer, one behind the other, without gradients.

    Args:
        blocks: an nn.Sequential of them.
        dtype: of the products, bf16 or fp16. Weights in another one are copied.
    """

    def __init__(self, blocks: nn.Sequential, dtype: torch.dtype):
        self.dtype = dtype
        self.scale = getattr(blocks[0].ls1, "gamma", None)
        self.parts = [
            (
                _norm(block.norm1),
                _attention(block, dtype),
                _norm(block.norm2),
                _linear(block.mlp.fc1, dtype),
                _linear(block.mlp.fc2, dtype, getattr(block.ls2, "gamma", None)),
            )
            for block in blocks
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C]."""
        x, branch = _stream(x, self.scale), None
        for norm1, attn, norm2, fc1, fc2 in self.parts:
            if branch is None:
                normal = layer_norm(x, *norm1, dtype=self.dtype)
            else:
                x, normal = add_layer_norm(x, branch, *norm1, self.dtype)
            x, normal = add_layer_norm(x, attn(normal), *norm2, self.dtype)
            branch = F.linear(linear_gelu(normal, *fc1), *fc2)
        return x + branch


class ConvNeXtBlock:
    """One of timm's ConvNeXt blocks, without gradients; arguments as above."""

    def __init__(self, block: nn.Module, dtype: torch.dtype):
        self.dtype = dtype
        self.scale = block.gamma
        self.conv = block.conv_dw
        self.norm = _norm(block.norm)
        self.fc1 = _linear(block.mlp.fc1, dtype)
        self.fc2 = _linear(block.mlp.fc2, dtype, block.gamma)

    def __call__(self, x: Tensor) -> Tensor:
        """A map [B, C, H, W]."""
        normal = layer_norm(self.conv(x).permute(0, 2, 3, 1), *self.norm, dtype=self.dtype)
        return _stream(x, self.scale) + F.linear(linear_gelu(normal, *self.fc1), *self.fc2).permute(
            0, 3, 1, 2
        )


def _stream(x: Tensor, scale: Tensor | None) -> Tensor:
    """x in the dtype that it has once a layer scale's result is added."""
    return x if scale is None else x.to(torch.promote_types(x.dtype, scale.dtype))


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)


def _linear(linear: nn.Linear, dtype: torch.dtype, scale: Tensor | None = None) -> Linear:
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if scale is not None:
        scale = scale.detach().float()
        weight, bias = scale[:, None] * weight.float(), scale * bias.float()
    return Linear(weight.to(dtype), bias.to(dtype))


def _attention(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The block's attention with its layer scale; itself if it has none, and that dtype."""
    attn, scale = block.attn, getattr(block.ls1, "gamma", None)
    if scale is None and attn.qkv.weight.dtype == dtype:
        return attn
    attn = copy.deepcopy(attn).requires_grad_(False)
    attn.proj.weight.data, attn.proj.bias.data = _linear(attn.proj, torch.float32, scale)
    return attn.to(dtype)


def why_not(module: nn.Module) -> str | None:
    """Why nothing can stand for blocks of a known kind; ``None`` if something can."""
    if has_global_hooks():
        return "there are hooks on all modules"
    expected, idle = _parts(), {nn.Identity, nn.Dropout}
    for name, part in module.named_modules():
        kinds = expected.get(type(part), {})
        for child_name, child in part.named_children():
            if type(child) not in kinds.get(child_name, kinds.get("*", idle)):
                return f"{f'{name}.' if name else ''}{child_name} is a {type(child).__name__}"
        if not is_plain(part):
            return f"{name or 'it'} has hooks, another forward or no bias"
        if part.training:
            return f"{name or 'it'} is in training mode"
        own = vars(part)  # a module takes long to say that it has no such attribute
        if own.get("approximate", "none") != "none":
            return f"{name} approximates GELU"
        if own.get("use_conv_mlp"):
            return f"{name or 'it'} has convolutions as MLP"
    return None


@functools.cache
def _parts() -> dict[type, dict[str, set[type]]]:
    """By class, what its parts may be for ours to compute the same; others must be idle."""
    from timm import layers
    from timm.models import convnext
    from timm.models import vision_transformer as vit

    norm = {nn.LayerNorm, layers.LayerNorm}
    mlp, gelu, linear = {layers.Mlp}, {nn.GELU, layers.GELU}, {nn.Linear}
    drop_path = {nn.Identity, layers.DropPath}
    scale = {nn.Identity, vit.LayerScale}
    return {
        nn.Sequential: {"*": {vit.Block}},
        vit.Block: {
            "norm1": norm,
            "attn": {vit.Attention},
            "ls1": scale,
            "drop_path1": drop_path,
            "norm2": norm,
            "mlp": mlp,
            "ls2": scale,
            "drop_path2": drop_path,
        },
        vit.Attention: {"qkv": linear, "proj": linear},
        convnext.ConvNeXtBlock: {
            "conv_dw": {nn.Conv2d},
            "norm": norm,
            "mlp": mlp,
            "shortcut": {nn.Identity},
            "drop_path": drop_path,
        },
        layers.Mlp: {"fc1": linear, "act": gelu, "fc2": linear},
    }


def _candidates(backbone: nn.Module) -> list[tuple[nn.Module, type]]:
    """Modules of the known kinds, with what may stand for them."""
    from timm.models import convnext
    from timm.models import vision_transformer as vit

    found: list[tuple[nn.Module, type]] = []
    for name, module in backbone.named_modules():
        if not name:
            continue  # the backbone itself, which is not to be kept
        if type(module) is convnext.ConvNeXtBlock:
            found.append((module, ConvNeXtBlock))
        elif type(module) is nn.Sequential and {type(block) for block in module} == {vit.Block}:
            found.append((module, TransformerBlocks))
    return found


class _Made:
    """What stands for a module, and the parameters that it was made of."""

    def __init__(self, module: nn.Module, kind: type, dtype: torch.dtype):
        self.module, self.kind, self.dtype = module, kind, dtype
        self.parameters = tuple(module.parameters())
        self.addresses = _addresses(self.parameters)
        self.versions = self._versions()
        self.call = self._make()

    def is_of(self, dtype: torch.dtype) -> bool:
        """Whether it was made for a dtype, of the parameters that the module has."""
        return dtype == self.dtype and self.addresses == _addresses(self.module.parameters())

    def refresh(self) -> None:
        """Takes over values that have changed; what a CUDA graph reads stays where it is."""
        versions = self._versions()
        if versions == self.versions or self.addresses != _addresses(self.parameters):
            return
        for old, new in zip(_tensors(vars(self.call)), _tensors(vars(self._make())), strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)
        self.versions = versions

    def _versions(self) -> list[int]:
        return [p._version for p in self.parameters]

    def _make(self) -> Call:
        # Tensors that inference mode makes could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            return self.kind(self.module, self.dtype)


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _tensors(value: object) -> list[Tensor]:
    """All tensors within, always in the same order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return list(value.parameters())
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


class _Kept:
    """What is known of a backbone: its candidates, and what stands for them."""

    def __init__(self, backbone: nn.Module):
        self.candidates = _candidates(backbone)
        self.made: dict[nn.Module, _Made] = {}

    def stand_ins(self, dtype: torch.dtype) -> dict[nn.Module, Call]:
        """By module; made once, and again where it has other parameters."""
        found = {}
        for module, kind in self.candidates:
            made = self.made.get(module)
            if why_not(module) is not None:
                self.made.pop(module, None)
                continue
            if made is None or not made.is_of(dtype):
                made = None
                self.made.pop(module, None)  # before the next takes memory
                made = self.made[module] = _Made(module, kind, dtype)
            made.refresh()
            found[module] = made.call
        return found

    def captured(self, dtype: torch.dtype) -> dict[nn.Module, Call]:
        """The same for a CUDA graph: what was made before it, refreshed before each replay."""
        made = self.made.values()
        usable = [m for m in made if m.is_of(dtype) and why_not(m.module) is None]

        def refresh() -> None:
            for m in usable:
                m.refresh()

        # In a graph that is captured by others, blocks run as ever: copies could grow old.
        return {m.module: m.call for m in usable} if before_replays(refresh) else {}


_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def forget(backbone: nn.Module) -> None:
    """Frees what was kept for a backbone that trains, or is not called, from now on."""
    _kept.pop(backbone, None)


def _covered(images: Tensor) -> bool:
    return why_not_device(images) is None and not torch.compiler.is_compiling()


def _capturing(images: Tensor) -> bool:
    return images.is_cuda and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def fewer_passes(backbone: nn.Module, images: Tensor) -> Iterator[None]:
    """Within it, without gradients, blocks that are known here run with fewer passes.

    Nothing changes on a CPU, in full precision, while PyTorch compiles or exports, and while a CUDA
    graph is captured by others than :class:`fastadapt.GraphedStep` and ``GraphedCall``.
    """
    stand_ins: dict[nn.Module, Call] = {}
    if not torch.is_grad_enabled() and _covered(images):
        if backbone not in _kept:
            _kept[backbone] = _Kept(backbone)
        kept = _kept[backbone]
        if kept.candidates:
            dtype = compute_dtype(next(kept.candidates[0][0].parameters()))
            if dtype in HALF:
                stand_ins = (kept.captured if _capturing(images) else kept.stand_ins)(dtype)
    for module, call in stand_ins.items():
        module.forward = call
    try:
        yield
    finally:
        for module in stand_ins:
            module.__dict__.pop("forward", None)
