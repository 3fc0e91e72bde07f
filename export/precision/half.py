"""Half precision for the parts of a folded model that bear it, fp32 for those that do not.

The precision is in the graph that is exported, so that every engine builds the same numbers. What
holds parameters is cast to half precision and casts what it is given; LayerNorm's statistics and
the few numbers that decide cluster attention's mixture stay in fp32 inside (ONNX Runtime and
TensorRT do the same). Layers that are kept in fp32 hand fp32 on: a sum with it is fp32, too, so
that a residual stream beyond fp16's 65504 survives.

Half precision is judged in PyTorch, not by running the graph: on a CPU, ONNX Runtime computes fp16
graphs in fp32, where nothing overflows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.errors import InputError
from fastadapt.fusion.batch_norm import fuse_batch_norms

from ..bundle.artefact import THRESHOLDS
from ..bundle.parity import Parity, compare
from ..folded_layers import FoldedClusterAttention

# Of the error that engines are allowed: another engine rounds elsewhere. What it turns an output by
# goes with its square.
MARGIN = 0.7
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Modules that use parameters of their own beside those of their parts.
WHOLE = (FoldedClusterAttention,)


class MixedPrecision(nn.Module):
    """A copy of a model in half precision, with fp32 input and output.

    Args:
        model: a folded model in fp32.
        dtype: ``torch.float16`` or ``torch.bfloat16``.
        units: names of the modules that cast; from :func:`precision_units`.
        keep: those of them that stay in fp32.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, units: Sequence[str], keep: Sequence[str] = ()
    ):
        super().__init__()
        self.num_classes = getattr(model, "num_classes", 0)
        self.dtype = dtype
        self.model = copy.deepcopy(model).to(dtype)
        # Rounded to half precision and back they would not be the fp32 weights any more.
        exact = dict(model.named_modules())
        for name in units:
            unit = self.model.get_submodule(name)
            kept = name in keep
            if kept:
                unit.float().load_state_dict(exact[name].state_dict())
            target = torch.float32 if kept else dtype
            unit.register_forward_pre_hook(_caster(target), with_kwargs=True)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*(x.to(self.dtype) for x in inputs)).float()


def _caster(dtype: torch.dtype):
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def hook(_, args, kwargs):
        return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}

    return hook


@torch.no_grad()
def precision_units(model: nn.Module, *example: Tensor) -> list[str]:
    """Names of the modules whose precision can be chosen, in the order in which they run.

    A unit holds parameters and no other unit. Where a part is not called but read (the output
    projection of nn.MultiheadAttention, say), the whole is the unit.

    Args:
        model: folded, fp32.
        example: its inputs.
    """
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if any(True for _ in module.parameters())
    ]
    try:
        model(*example)
    finally:
        for hook in hooks:
            hook.remove()

    def is_unit(module: nn.Module, name: str) -> bool:
        prefix = f"{name}." if name else ""
        parts = [
            prefix + part
            for part, child in module.named_children()
            if any(True for _ in child.parameters())
        ]
        read = [p for p in parts if not any(n == p or n.startswith(f"{p}.") for n in called)]
        return not parts or bool(read) or isinstance(module, WHOLE)

    units: list[str] = []
    for name in dict.fromkeys(called):
        inside = any(name.startswith(f"{unit}." if unit else "") for unit in units)
        if not inside and is_unit(model.get_submodule(name), name):
            units.append(name)
    return units


@dataclass(frozen=True)
class Reduced:
    """A model in half precision that passes the gate.

    Attributes:
        module: fp32 in, fp32 out.
        precision: ``"fp16"`` or ``"bf16"``.
        fp32_layers: names of the layers that need fp32.
        parity: against the adapted model.
        tried: what was refused on the way, in words.
    """

    module: nn.Module
    precision: str
    fp32_layers: tuple[str, ...]
    parity: Parity
    tried: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"fp32_layers": list(self.fp32_layers), "tried": list(self.tried)}


def reduce_precision(
    folded: nn.Module,
    precision: str,
    outputs: Callable[[nn.Module], np.ndarray],
    expected: np.ndarray,
    example: tuple[Tensor, ...],
    *,
    classes: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> Reduced:
    """The model in half precision: whole, in bf16 if fp16 is not enough, or with fp32 layers.

    Args:
        folded: in fp32.
        precision: ``"fp16"`` or ``"bf16"``.
        outputs: runs a module (of normalised images) on the gate's images: [samples, outputs].
        expected: the adapted model's outputs for the same images.
        example: inputs of ``folded``, images normalised; one sample is enough.
        classes: whether the outputs are classes.
        tell: gets a line for every attempt.

    Raises:
        InputError: not even fp32 passes: the gate or the images are at fault, not the precision.
    """
    if isinstance(folded, AdaptedModel):
        folded = fuse_batch_norms(folded, *example)  # their statistics do not fit fp16
    units = precision_units(folded, *example)
    tried: list[str] = []

    def attempt(name: str, keep: Sequence[str] = ()) -> tuple[nn.Module, Parity]:
        module = MixedPrecision(folded, DTYPES[name], units, keep).eval()
        stage = f"{name} in PyTorch"
        try:
            values = outputs(module)
        except RuntimeError as error:  # dtypes that meet where no unit casts
            reason = str(error).strip().splitlines()[0]
            return module, Parity(stage, 0, len(expected), problems=(reason,))
        allowed = THRESHOLDS[name]
        cosine = 1 - MARGIN**2 * (1 - allowed.cosine)
        limits = replace(allowed, error=MARGIN * allowed.error, cosine=cosine)
        return module, compare(expected, values, stage=stage, classes=classes, thresholds=limits)

    for name in dict.fromkeys((precision, "bf16")):
        module, parity = attempt(name)
        if parity.passed:
            return Reduced(module, name, (), parity, tuple(tried))
        tried.append(f"{name}: {parity.problems[0]}")
        tell(f"{tried[-1]}; trying {'layers in fp32' if name == 'bf16' else 'bf16'}")

    def passes(keep: Sequence[str]) -> bool:
        return attempt(precision, keep)[1].passed

    if not passes(units):
        parity = attempt(precision, units)[1]
        raise InputError(
            f"{precision} does not pass the gate even with every layer in fp32: "
            f"{parity.problems[0]}. Export with --precision fp32."
        )
    keep = smallest_set(units, passes)
    tell(f"{len(keep)} of {len(units)} layers stay in fp32: {', '.join(keep)}")
    module, parity = attempt(precision, keep)
    return Reduced(module, precision, tuple(keep), parity, tuple(tried))


def smallest_set(items: Sequence[str], passes: Callable[[list[str]], bool]) -> list[str]:
    """What of ``items`` cannot be left out: halves first, then quarters, down to single ones.

    ``passes(items)`` holds at the start and for the result, which no single item can leave.
    """
    kept, size = list(items), len(items)
    while size:
        position, changed = 0, False
        while position < len(kept):
            rest = kept[:position] + kept[position + size :]
            if passes(rest):
                kept, changed = rest, True
            else:
                position += size
        # What was needed because of another item may not be any more.
        if size > 1 or not changed:
            size //= 2
    return kept
