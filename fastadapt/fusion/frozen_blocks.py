"""Run the blocks of a frozen backbone as fused operations in half precision.

Under autocast PyTorch executes a block operator by operator: LayerNorm writes fp32, which the
following product rounds; GELU, layer scale and residual additions are kernels of their own; and
weights that need no gradient are rounded in every call. Here blocks are computed as
:mod:`fastadapt.fusion.block_calls` says, with weights that are rounded once and kept.

Covered are timm's vision transformers (with layer scale, too: DINOv2) and ConvNeXt. Any other
block, one that was changed inside, or one with hooks runs unchanged.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastadapt.cuda_graph import before_replays
from fastadapt.fusion.block_calls import (
    ConvNeXtBlock,
    NormAndConvolution,
    PatchConvolution,
    TransformerBlocks,
    is_first_of_patches,
)
from fastadapt.kernels.common.dispatch import compute_dtype, why_not_device
from fastadapt.layers.unmodified import has_global_hooks, is_unmodified

HALF = (torch.bfloat16, torch.float16)

Call = Callable[[Tensor], Tensor]


def why_not_fused(module: nn.Module) -> str | None:
    """Say why a block of a known kind cannot be fused; ``None`` if it can."""
    if has_global_hooks():
        return "there are hooks on all modules"
    idle: set[type] = {nn.Identity, nn.Dropout}
    expected = _parts()
    for name, part in module.named_modules():
        kinds = expected.get(type(part), {})
        for child_name, child in part.named_children():
            if type(child) not in kinds.get(child_name, kinds.get("*", idle)):
                return f"{f'{name}.' if name else ''}{child_name} is a {type(child).__name__}"
        if not is_unmodified(part):
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
    """Return, by class, the children for which the fused computation is the same.

    Children that are not listed must be identities or dropouts.
    """
    from timm import layers
    from timm.models import convnext
    from timm.models import vision_transformer as vit

    norm: set[type] = {nn.LayerNorm, layers.LayerNorm}
    mlp: set[type] = {layers.Mlp}
    gelu: set[type] = {nn.GELU, layers.GELU}
    linear: set[type] = {nn.Linear}
    drop_path: set[type] = {nn.Identity, layers.DropPath}
    scale: set[type] = {nn.Identity, vit.LayerScale}
    return {
        nn.Sequential: {"*": {vit.Block, layers.LayerNorm2d, nn.Conv2d}},
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


def find_blocks(backbone: nn.Module) -> list[tuple[nn.Module, type]]:
    """List the modules of the known kinds with the class that runs them fused."""
    from timm.layers import LayerNorm2d, PatchEmbed
    from timm.models import convnext
    from timm.models import vision_transformer as vit

    found: list[tuple[nn.Module, type]] = []
    for name, module in backbone.named_modules():
        if not name:
            continue  # the backbone itself: a reference from the registry would keep it alive
        if type(module) is convnext.ConvNeXtBlock:
            found.append((module, ConvNeXtBlock))
        elif type(module) is PatchEmbed and is_first_of_patches(module.proj):
            found.append((module.proj, PatchConvolution))
        elif type(module) is nn.Sequential:
            kinds = [type(part) for part in module]
            if set(kinds) == {vit.Block}:
                found.append((module, TransformerBlocks))
            elif len(kinds) == 2 and set(kinds) == {LayerNorm2d, nn.Conv2d}:
                found.append((module, NormAndConvolution))
    return found


class FusedBlock:
    """The fused call of a module, and the parameters that it was made from."""

    def __init__(self, module: nn.Module, kind: type, dtype: torch.dtype):
        self.module, self.kind, self.dtype = module, kind, dtype
        self.parameters = tuple(module.parameters())
        self.addresses = _addresses(self.parameters)
        self.versions = self._versions()
        self.call = self._make()

    def is_of(self, dtype: torch.dtype) -> bool:
        """Tell whether it was made for this dtype from the parameters that the module has now."""
        return dtype == self.dtype and self.addresses == _addresses(self.module.parameters())

    def refresh(self) -> None:
        """Copy changed values in place, so that CUDA graphs read them at the same addresses."""
        versions = self._versions()
        if versions == self.versions or self.addresses != _addresses(self.parameters):
            return
        for old, new in zip(self.tensors(), _tensors(vars(self._make())), strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)
        self.versions = versions

    def tensors(self) -> list[Tensor]:
        """List the tensors that the fused call reads, always in the same order."""
        return _tensors(vars(self.call))

    def _versions(self) -> list[int]:
        return [p._version for p in self.parameters]

    def _make(self) -> Call:
        # Tensors that inference mode makes could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            return self.kind(self.module, self.dtype)


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _tensors(value: object) -> list[Tensor]:
    """List all tensors inside a value, always in the same order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, nn.Module):
        return list(value.parameters())
    if isinstance(value, PatchConvolution):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


class BlockCache:
    """The fused calls of one backbone's blocks."""

    def __init__(self, backbone: nn.Module):
        self.candidates = find_blocks(backbone)
        self.made: dict[nn.Module, FusedBlock] = {}

    def calls(self, dtype: torch.dtype) -> dict[nn.Module, Call]:
        """Return fused calls by module, made once and again where parameters were exchanged."""
        found = {}
        for module, kind in self.candidates:
            made = self.made.get(module)
            if why_not_fused(module) is not None:
                self.made.pop(module, None)
                continue
            if made is None or not made.is_of(dtype):
                made = None
                self.made.pop(module, None)  # before the next takes memory
                made = self.made[module] = FusedBlock(module, kind, dtype)
            made.refresh()
            found[module] = made.call
        return found

    def calls_in_graph(self, dtype: torch.dtype) -> dict[nn.Module, Call]:
        """Return fused calls that exist already; they are refreshed before each graph replay."""
        made = self.made.values()
        usable = [m for m in made if m.is_of(dtype) and why_not_fused(m.module) is None]

        def refresh() -> None:
            for m in usable:
                m.refresh()

        # In a graph captured by other code blocks run unfused: nothing would refresh the copies.
        return {m.module: m.call for m in usable} if before_replays(refresh) else {}


caches: WeakKeyDictionary[nn.Module, BlockCache] = WeakKeyDictionary()


def release_fused_blocks(backbone: nn.Module) -> None:
    """Free the copies kept for a backbone that trains, or is not called, from now on."""
    caches.pop(backbone, None)


def is_covered(images: Tensor) -> bool:
    """Tell whether the fused operations run on the device of the images, eagerly."""
    return why_not_device(images) is None and not torch.compiler.is_compiling()


def is_capturing(images: Tensor) -> bool:
    """Tell whether the current CUDA stream is capturing a graph."""
    return images.is_cuda and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def fused_blocks(backbone: nn.Module, images: Tensor) -> Iterator[None]:
    """Run the known blocks of a backbone fused, inside the context and without gradients.

    Nothing changes on a CPU, in full precision, while PyTorch compiles or exports, and while a CUDA
    graph is captured by other code than :class:`fastadapt.GraphedStep` and ``GraphedCall``.

    Args:
        backbone: a timm model, or any module that contains timm's blocks.
        images: the input, whose device decides.
    """
    calls: dict[nn.Module, Call] = {}
    if not torch.is_grad_enabled() and is_covered(images):
        if backbone not in caches:
            caches[backbone] = BlockCache(backbone)
        cache = caches[backbone]
        if cache.candidates:
            dtype = compute_dtype(next(cache.candidates[0][0].parameters()))
            if dtype in HALF:
                calls = (cache.calls_in_graph if is_capturing(images) else cache.calls)(dtype)
    # An instance's own forward, for this call alone: the modules, their names and their state
    # dict, timm's interface, stay as they are.
    try:
        for module, call in calls.items():
            module.forward = call  # type: ignore[method-assign]
        yield
    finally:
        for module in calls:
            module.__dict__.pop("forward", None)
