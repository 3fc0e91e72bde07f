"""A fused model: its steps, and the file that holds them.

The file is safetensors, with the tensors of step 3 as ``"3.qkv_weight"``, …; the JSON file beside
it has the steps' kinds and numbers. Neither holds code: what runs is this package.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt.errors import InputError, first_line
from fastadapt.files import atomic_path
from fastadapt.fusion.kernel_choices import Choices, default_choices

from .steps import KINDS, Flow, Patches, Step

# In "fp8" some weights are in e4m3, and all else is in bf16.
PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
MOST_STEPS = 1000


class FusedModel:
    """Run a folded model as a list of fused operations, for inference.

    Args:
        steps: the operations.
        size: height and width of the images.
        dtype: of the products.
        choices: which kernels compute; by the batch and the GPU if ``None``.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        size: tuple[int, int],
        dtype: torch.dtype,
        choices: Choices | None = None,
    ):
        self.steps = list(steps)
        self.size = size
        self.dtype = dtype
        self.choices = choices
        self._constants: dict[tuple[int, str, bool], Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, images: Tensor, observe: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Map uint8 images [B, H, W, 3] to outputs [B, outputs] in fp32.

        Args:
            images: on the model's device.
            observe: called with the index of each step with an MLP, and GELU's result there.

        Raises:
            InputError: the images have another dtype or size.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (*self.size, 3):
            raise InputError(
                f"images are {images.dtype} {list(images.shape)}; expected uint8 "
                f"[batch, {self.size[0]}, {self.size[1]}, 3]"
            )
        choices = self.choices or default_choices(
            len(images) * self._tokens(), self.dtype, images.device
        )
        flow = Flow(images, choices, constants=self._constants, observe=observe)
        for index, step in enumerate(self.steps):
            flow = step(replace(flow, index=index))
        return flow.x.float()

    @property
    def _patches(self) -> Patches:
        first = self.steps[0]
        assert isinstance(first, Patches)
        return first

    def _tokens(self) -> int:
        return self.size[0] * self.size[1] // self._patches.patch**2

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self._patches.weight.device

    def to(self, device: torch.device | str) -> FusedModel:
        """Return the model with its tensors on a device."""

        def move(step: Step) -> Step:
            tensors: dict[str, Any]
            tensors = {k: v.to(device) for k, v in vars(step).items() if isinstance(v, Tensor)}
            return dataclasses.replace(step, **tensors)

        return FusedModel([move(s) for s in self.steps], self.size, self.dtype, self.choices)

    def save(self, path: str | Path) -> list[dict[str, Any]]:
        """Write the tensors to a safetensors file; return the rest, for the JSON file."""
        from safetensors.torch import save_file

        names = {kind: name for name, kind in KINDS.items()}
        tensors, rest = {}, []
        for index, step in enumerate(self.steps):
            numbers = {"kind": names[type(step)]}
            defaults = {f.name: f.default for f in dataclasses.fields(step)}
            for key, value in vars(step).items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{key}"] = value.cpu().contiguous()
                elif value not in (None, defaults.get(key)):
                    numbers[key] = value
            rest.append(numbers)
        with atomic_path(Path(path)) as temporary:
            save_file(tensors, str(temporary))
        return rest


def load(path: str | Path, details: dict[str, Any]) -> FusedModel:
    """Read a fused model.

    Args:
        path: the safetensors file.
        details: of the JSON file beside it.

    Raises:
        InputError: the files are damaged, do not belong together, or are of a newer version.
    """
    from safetensors.torch import load_file

    path = Path(path)
    try:
        tensors = load_file(str(path))
    except Exception as error:  # safetensors' own exception has no base
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    try:
        described, size = details["steps"], details["size"]
        dtype = PRECISIONS[details["precision"]]
        if not isinstance(described, list) or not 0 < len(described) <= MOST_STEPS:
            raise ValueError(f"'steps' is no list of up to {MOST_STEPS} steps")
        if len(size) != 2 or not all(type(side) is int and 0 < side <= 65536 for side in size):
            raise ValueError(f"'size' is {size}")
        steps = [_step(index, numbers, tensors) for index, numbers in enumerate(described)]
        if type(steps[0]) is not Patches:
            raise ValueError("the first step is not 'patches'")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path.name}.json does not describe {path.name}: {type(error).__name__}: "
            f"{first_line(error)}. Copy the bundle again, or update fastadapt."
        ) from None
    unused = tensors.keys() - {f"{i}.{k}" for i, s in enumerate(steps) for k in vars(s)}
    if unused:
        raise InputError(f"{path.name} holds {min(unused)!r}, which no step has")
    return FusedModel(steps, tuple(size), dtype)


def _step(index: int, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> Step:
    """Make one step of its numbers and tensors; raise ValueError for a value of another type."""
    kind = KINDS[numbers["kind"]]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        hint, name = hints[field.name], f"{index}.{field.name}"
        if hint in (int, float):
            optional = field.default is not dataclasses.MISSING
            if field.name in numbers or not optional:
                values[field.name] = _number(numbers[field.name], hint, name)
        elif name in tensors:
            values[field.name] = tensors[name]
        elif not isinstance(hint, types.UnionType):
            raise ValueError(f"there is no tensor {name!r}")
    if extra := numbers.keys() - values.keys() - {"kind"}:
        raise ValueError(f"step {index} has no {min(extra)!r}")
    return kind(**values)


def _number(value: Any, kind: type, name: str) -> Any:
    if type(value) not in (int, kind) or not 0 <= value <= 1e6:
        raise ValueError(f"{name} is {value!r}")
    return kind(value)
