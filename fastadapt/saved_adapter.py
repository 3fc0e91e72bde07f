"""Read the configuration of a saved adapter: every value typed and bounded before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor

from fastadapt.config import AdaptConfig
from fastadapt.errors import InputError
from fastadapt.layers.lora import LoRASlice
from fastadapt.settings import Setting, Settings

LARGEST = 2**31
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPES |= {"float64": torch.float64}
Dtype = Literal["float16", "bfloat16", "float32", "float64"]


Shapes = dict[str, tuple[int | None, ...]]  # by tensor; None fits any length


def check_shapes(wanted: Shapes, state: Mapping[str, Tensor], where: Path) -> None:
    """Compare the shapes that a configuration wants with the tensors that are there.

    Raises:
        InputError: a tensor has another shape, or is missing.
    """
    for name, shape in wanted.items():
        if name not in state:
            raise InputError(f"{where} lacks {name!r}, which its configuration wants")
        found = tuple(state[name].shape)
        fits = len(found) == len(shape)
        if not fits or any(s not in (None, f) for s, f in zip(shape, found, strict=True)):
            raise InputError(
                f"{where}: {name} has shape {found}; its configuration wants "
                f"{tuple('any' if s is None else s for s in shape)}"
            )


@dataclass(frozen=True)
class SavedBackbone(Settings):
    """Say on which backbone an adapter was trained."""

    kind: Annotated[Literal["timm", "module"], Setting("Whether it can be made by name.")]
    name: Annotated[str, Setting("timm's name, or the module's class.")]
    trained: Annotated[bool, Setting("Whether the checkpoint holds the whole backbone.")]
    fingerprint: Annotated[
        str | None, Setting("Hash of the pretrained weights that the checkpoint does not hold.")
    ] = None
    pretrained: Annotated[bool, Setting("Whether it has timm's weights.")] = False
    weights: Annotated[str | None, Setting("File of its weights.")] = None
    dtypes: Annotated[
        dict[str, Dtype] | None,
        Setting(
            "Dtype of its weights under an empty name, exceptions by name; unknown if None.",
            expected="names with a dtype each",
        ),
    ] = None

    def source(self) -> dict[str, Any]:
        """Return how the backbone was made, as :attr:`AdaptedModel.source` holds it."""
        if self.kind == "module":
            return {"kind": self.kind, "name": self.name}
        return {
            "kind": self.kind,
            "name": self.name,
            "pretrained": self.pretrained,
            "weights": self.weights,
        }


@dataclass(frozen=True)
class SavedSlice(Settings):
    """Say on which rows of a linear layer a low-rank pair acts; see :class:`LoRASlice`."""

    name: Annotated[str, Setting("Key of the pair.")]
    start: Annotated[int, Setting("First row.", ge=0, limit=LARGEST)]
    stop: Annotated[int, Setting("Row after the last.", ge=1, limit=LARGEST)]
    r: Annotated[int, Setting("Rank.", ge=1, limit=LARGEST)]
    scaling: Annotated[float, Setting("Factor of the update.")]


@dataclass(frozen=True)
class SavedLayer:
    """Hold the low-rank pairs of one layer."""

    slices: list[LoRASlice]
    dropout: float


@dataclass(frozen=True)
class SavedAdapter:
    """Hold what ``config.json`` says of a saved adapter.

    Attributes:
        settings: of the adapter.
        backbone: that it was trained on.
        lora_layers: low-rank adapters by the layers' names.
        changed: the backbone's tensors that the checkpoint holds, by name.
        num_classes: of the head; 0 for none.
        temperature: what the logits are divided by.
    """

    settings: AdaptConfig
    backbone: SavedBackbone
    lora_layers: dict[str, SavedLayer]
    changed: tuple[str, ...]
    num_classes: int
    temperature: float = 1.0

    @classmethod
    def from_dict(cls, config: dict[str, Any], where: Path) -> Self:
        """Read the configuration that a file holds.

        Raises:
            InputError: a key is missing or unknown, or a value has another type or range.
        """
        for key in ("adapt", "backbone", "lora_layers", "changed", "num_classes"):
            if key not in config:
                raise InputError(f"{where} lacks the key {key!r}")
        count, changed, layers = config["num_classes"], config["changed"], config["lora_layers"]
        if type(count) is not int or not 0 <= count <= LARGEST:
            raise InputError(f"{where}: num_classes is {count!r}; expected 0 or more")
        if not isinstance(changed, list) or not all(isinstance(name, str) for name in changed):
            raise InputError(f"{where}: changed is no list of names")
        if not isinstance(layers, dict):
            raise InputError(f"{where}: lora_layers is no JSON object")
        temperature = config.get("temperature", 1.0)
        if type(temperature) not in (int, float) or not 1e-3 <= temperature <= 1e3:
            raise InputError(f"{where}: temperature is {temperature!r}; expected 0.001 to 1000")
        return cls(
            AdaptConfig.from_dict(config["adapt"]),
            SavedBackbone.from_dict(config["backbone"], f"{where}, backbone"),
            {name: _read_layer(layer, f"{where}, {name}") for name, layer in layers.items()},
            tuple(changed),
            count,
            float(temperature),
        )

    def check_sizes(self, state: Mapping[str, Tensor], where: Path) -> None:
        """Compare the sizes that would be allocated with the tensors that are there.

        Raises:
            InputError: a tensor has another shape, or is missing.
        """
        check_shapes(self._shapes(state), state, where)

    def _shapes(self, state: Mapping[str, Tensor]) -> Shapes:
        """Return the shapes of the tensors that bound all sizes."""
        shapes: Shapes = {}
        if self.num_classes:
            shapes["head.weight"] = (self.num_classes, None)
        settings = self.settings
        if settings.adapter == "cladapter":
            width = settings.rank if settings.mode == "channel" else None
            for index in (0, settings.depth - 1):
                block = f"adapter.blocks.{index}"
                shapes[f"{block}.attn.transforms"] = (settings.num_centers, width, width)
                shapes[f"{block}.mlp.fc1.weight"] = (None, None)
            first = state.get("adapter.blocks.0.mlp.fc1.weight")
            if first is not None and first.dim() == 2:
                hidden = int(first.shape[1] * settings.mlp_ratio)
                shapes["adapter.blocks.0.mlp.fc1.weight"] = (hidden, None)
        for name, layer in self.lora_layers.items():
            for pair in layer.slices:
                shapes[f"backbone.{name}.lora_A.{pair.name}"] = (pair.r, None)
                shapes[f"backbone.{name}.lora_B.{pair.name}"] = (pair.stop - pair.start, pair.r)
        return shapes


def _read_layer(values: Any, where: str) -> SavedLayer:
    if not isinstance(values, dict) or not isinstance(values.get("slices"), list):
        raise InputError(f"{where}: expected a JSON object with the slices of a layer")
    dropout = values.get("dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{where}: dropout is {dropout!r}; expected 0 or more, less than 1")
    saved = [SavedSlice.from_dict(each, where) for each in values["slices"]]
    if not saved or any(each.stop <= each.start for each in saved):
        raise InputError(f"{where}: expected at least one slice of at least one row")
    slices = [LoRASlice(s.name, s.start, s.stop, s.r, s.scaling) for s in saved]
    return SavedLayer(slices, float(dropout))
