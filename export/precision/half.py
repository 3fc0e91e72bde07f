"""Half precision where a folded model stays accurate in it, fp32 elsewhere.

The precision is in the graph that is exported, so that every engine builds the same numbers.
Modules with parameters are cast to half precision and cast their inputs; LayerNorm's statistics
and the few numbers that decide cluster attention's mixture stay in fp32 inside (ONNX Runtime and
TensorRT do the same). Layers that are kept in fp32 return fp32: a sum with it is fp32, too, so
that residual activations beyond fp16's 65504 survive.

Half precision is judged in PyTorch, not by running the graph: on a CPU, ONNX Runtime computes fp16
graphs in fp32, where nothing overflows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.errors import InputError, counted, first_line, form
from fastadapt.fusion.batch_norm import fuse_batch_norms
from fastadapt.train.shared_backbone import SharedBackbone

from ..folded_layers import FoldedClusterAttention
from ..parity import THRESHOLDS, Parity, compare_tasks, worst
from ..tasks import Task

T = TypeVar("T")
# Share of the error that engines are allowed, since another engine rounds elsewhere. One minus the
# cosine goes with the square of the error.
MARGIN = 0.7
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Modules that use parameters of their own beside those of their children.
WHOLE = (FoldedClusterAttention,)


class MixedPrecision(nn.Module):
    """A copy of a model in half precision, with fp32 inputs and output.

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

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Cast the inputs, run the model and cast its output, or each of several, to fp32."""
        outputs = self.model(*(x.to(self.dtype) for x in inputs))
        if isinstance(outputs, tuple):
            return tuple(output.float() for output in outputs)
        return outputs.float()


def _caster(dtype: torch.dtype):
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def hook(_, args, kwargs):
        return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}

    return hook


@torch.no_grad()
def precision_units(model: nn.Module, *example: Tensor) -> list[str]:
    """Return the names of the modules whose precision can be chosen, in the order they run in.

    A unit holds parameters and no other unit. Where a child is not called but read (the output
    projection of nn.MultiheadAttention, say), its parent is the unit.

    Args:
        model: folded, fp32.
        example: inputs of the model.
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
    """A model in half precision that passes the parity check.

    Attributes:
        module: fp32 in, fp32 out.
        precision: ``"fp16"`` or ``"bf16"``.
        fp32_layers: names of the layers that need fp32.
        parity: the comparison with the trained model.
        tried: what was refused before, in words.
    """

    module: nn.Module
    precision: str
    fp32_layers: tuple[str, ...]
    parity: Parity
    tried: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest records."""
        return {"fp32_layers": list(self.fp32_layers), "tried": list(self.tried)}


@dataclass(frozen=True)
class Trial:
    """How a module in half precision is tried.

    Attributes:
        outputs: runs a module (of normalised images) on some samples: [samples, outputs].
        expected: the trained model's outputs for the same samples.
        example: inputs of the module, images normalised; one sample is enough.
        classes: whether the outputs are classes.
        tasks: of the model, where it has several; each must pass.
    """

    outputs: Callable[[nn.Module], np.ndarray]
    expected: np.ndarray
    example: tuple[Tensor, ...]
    classes: bool = True
    tasks: tuple[Task, ...] = ()

    def run(self, module: nn.Module, precision: str) -> Parity:
        """Compare a module with the trained model, with a margin to the precision's limits."""
        stage = f"{precision} in PyTorch"
        try:
            values = self.outputs(module)
        except RuntimeError as error:  # dtypes that meet where no unit casts
            return Parity(stage, 0, len(self.expected), problems=(first_line(error),))
        allowed = THRESHOLDS[precision]
        cosine = 1 - MARGIN**2 * (1 - allowed.cosine)
        limits = replace(allowed, error=MARGIN * allowed.error, cosine=cosine)
        found = compare_tasks(
            self.expected,
            values,
            self.tasks,
            stage=stage,
            classes=self.classes,
            thresholds=limits,
        )
        return worst(found, self.tasks)


def reduce_precision(
    folded: nn.Module,
    precision: str,
    trial: Trial,
    *,
    tell: Callable[[str], None] = lambda line: None,
) -> Reduced:
    """Convert a model to half precision, to bf16 if fp16 is not enough, or with layers in fp32.

    Args:
        folded: in fp32.
        precision: ``"fp16"`` or ``"bf16"``.
        trial: how the result is tried.
        tell: receives a line for every attempt.

    Raises:
        InputError: not even fp32 passes: the limits or the images are at fault, not the precision.
    """
    folded = without_batch_norms(folded, *trial.example)  # their statistics do not fit fp16
    units = precision_units(folded, *trial.example)
    tried: list[str] = []

    def attempt(name: str, keep: Sequence[str] = ()) -> tuple[nn.Module, Parity]:
        module = MixedPrecision(folded, DTYPES[name], units, keep).eval()
        return module, trial.run(module, name)

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
            f"{precision} does not pass the parity check even with every layer in fp32: "
            f"{parity.problems[0]}. Export with `precision='fp32'`."
        )
    keep = smallest_set(units, passes)
    tell(
        f"{len(keep)} of {counted(len(units), 'layer')} {form(len(keep), 'stays', 'stay')} in "
        f"fp32: {', '.join(keep)}"
    )
    module, parity = attempt(precision, keep)
    return Reduced(module, precision, tuple(keep), parity, tuple(tried))


def without_batch_norms(folded: nn.Module, *example: Tensor) -> nn.Module:
    """Merge a folded model's batch norms into its convolutions, where its kind is known."""
    one_backbone = isinstance(folded, SharedBackbone) and folded.shared
    if isinstance(folded, AdaptedModel) or one_backbone:
        return fuse_batch_norms(folded, *example)
    return folded


def smallest_set(items: Sequence[T], passes: Callable[[list[T]], bool]) -> list[T]:
    """Find the items that cannot be left out: try halves first, then quarters, then single ones.

    ``passes(items)`` holds at the start and for the result; without any one item of the result
    it does not.
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
