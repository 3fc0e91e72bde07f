"""Find the parameters of a backbone that its features depend on, and its last blocks."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.backbones import FeatureFn, FeatureSpec
from fastadapt.errors import InputError, counted
from fastadapt.unplanned import unplanned

COMPILED = "_orig_mod."  # how torch.compile prefixes the names inside a module


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of torch.compile and of data-parallel training."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(
            module, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def plain_name(name: str) -> str:
    """Return a tensor's name without the wrappers of torch.compile and of low-rank adapters."""
    name = name.replace(COMPILED, "")
    return name.replace(".base.weight", ".weight").replace(".base.bias", ".bias")


def used_parameters(module: nn.Module, feature_fn: FeatureFn, spec: FeatureSpec) -> set[str]:
    """Return the names of the parameters that the features depend on.

    Runs the backbone once on an image of zeros and follows autograd's graph from the features to
    the parameters. A classifier that the features do not pass is not among them.

    Args:
        module: the backbone.
        feature_fn: computes features of (module, images).
        spec: of the features.

    Raises:
        InputError: the features carry no gradients (the function detaches them, say).
    """
    parameters = dict(module.named_parameters())
    was_training, required = module.training, {n: p.requires_grad for n, p in parameters.items()}
    like = next((p for p in parameters.values() if p.is_floating_point()), None)
    if like is None:
        return set()
    images = torch.zeros(1, *spec.input_size, device=like.device, dtype=like.dtype)
    module.eval()
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.inference_mode(False), torch.enable_grad():
            reached = _leaves(unplanned(lambda: feature_fn(module, images)))
    finally:
        module.train(was_training)
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
    if not reached:
        raise InputError(
            f"the features of {type(module).__name__} carry no gradients, so that the backbone "
            "cannot be trained: its feature function must not detach them or use no_grad"
        )
    return {name for name, parameter in parameters.items() if id(parameter) in reached}


def _leaves(features: Tensor) -> set[int]:
    """Return the ids of all leaf tensors in the autograd graph of some features."""
    reached: set[int] = set()
    seen: set[Any] = set()
    waiting = [features.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            reached.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return reached


def last_blocks(module: nn.Module, count: int, name: str = "last") -> set[str]:
    """Return the names of the parameters in the last blocks, and of all that follows them.

    timm's models say themselves what a block is (``group_matcher``). In other modules it is a
    member of the list of equal layers that holds more than half of the parameters.

    Args:
        module: the backbone.
        count: how many blocks.
        name: of the parameter that says so, for messages.

    Raises:
        InputError: the backbone has fewer blocks, or none that are recognised.
    """
    if count < 1:
        raise InputError(f"{name} is {count}; expected at least 1 block, or None for the backbone")
    inner = uncompiled(module)
    blocks, tail = _timm_blocks(inner) or _listed_blocks(inner)
    kind = type(inner).__name__
    if not blocks:
        raise InputError(
            f"the blocks of {kind} are not known: leave out `{name}`, or unfreeze parameters "
            "yourself with requires_grad_(True)"
        )
    if count > len(blocks):
        raise InputError(
            f"{name} is {count}; {kind} has {counted(len(blocks), 'block')}: expected 1 to "
            f"{len(blocks)}; leave it out for all of them"
        )
    chosen = tail.union(*blocks[-count:])
    return {path for path, _ in module.named_parameters() if path.replace(COMPILED, "") in chosen}


Blocks = tuple[list[set[str]], set[str]]  # parameters of each block, and of what follows the last


def _timm_blocks(module: Any) -> Blocks | None:
    """Return the blocks that a timm model names by its ``group_matcher``."""
    if not hasattr(module, "group_matcher"):
        return None
    from timm.models import group_parameters

    matcher = module.group_matcher(coarse=False)
    groups = [set(names) for _, names in sorted(group_parameters(module, matcher).items())]
    # The first group is the stem. A last group without a number in its names (head.norm, conv_head)
    # is no block; a last norm that timm counts to the last block stays in it.
    numbered = re.compile(r"\.\d+\.")
    blocks = [group for group in groups[1:] if any(numbered.search(name) for name in group)]
    return blocks, set().union(*(group for group in groups[1:] if group not in blocks))


def _listed_blocks(module: nn.Module) -> Blocks:
    """Return the members of the list of equal layers that holds most of a module's parameters."""
    names = [name for name, _ in module.named_parameters()]
    for prefix, layers in module.named_modules():
        if not isinstance(layers, nn.ModuleList | nn.Sequential) or len(layers) < 2:
            continue
        if len({type(layer) for layer in layers}) > 1:
            continue
        numels = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        if not all(numels) or 2 * sum(numels) <= sum(p.numel() for p in module.parameters()):
            continue
        start = f"{prefix}." if prefix else ""
        blocks = [{n for n in names if n.startswith(f"{start}{i}.")} for i in range(len(layers))]
        last = max(index for index, name in enumerate(names) if name in blocks[-1])
        return blocks, set(names[last + 1 :])
    return [], set()


def unfrozen_modules(module: nn.Module, parameters: Collection[str]) -> list[tuple[str, nn.Module]]:
    """Return the outermost modules all of whose parameters are among the given ones, by name."""
    found: list[tuple[str, nn.Module]] = []
    for name, part in module.named_modules() if parameters else ():
        start = f"{name}." if name else ""
        own = [start + key for key, _ in part.named_parameters()]
        inside = any(name.startswith(f"{outer}.") or not outer for outer, _ in found)
        if own and not inside and all(key in parameters for key in own):
            found.append((name, part))
    return found
