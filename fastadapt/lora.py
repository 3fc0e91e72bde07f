"""Add LoRA to chosen linear layers of a backbone, new or loaded from a PEFT folder."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.config import PROJECTIONS, LoRAConfig
from fastadapt.errors import InputError, nearest
from fastadapt.files import check_finite, read_json, read_tensors
from fastadapt.layers.lora import LoRALinear, LoRASlice
from fastadapt.patterns import check_patterns, match_end
from fastadapt.peft_config import PeftConfig, ends_with_any

USUAL_RANK = 4096  # larger ones must not exceed the layer
FUSED = {"qkv": "qkv", "kv": "kv", "in_proj": "qkv"}


def apply_lora(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Wrap the chosen linear layers of ``model`` in place and return their names.

    Raises:
        InputError: no layer matches, a matching one cannot take an adapter, or some have one.
    """
    if there := list(lora_layers(model)):
        raise InputError(
            f"the backbone has low-rank adapters already ({there[0]} and {len(there) - 1} more): "
            "merge them first (backbone = fa.fold(backbone)), or leave out `lora` to train them on"
        )
    slices = {}
    names = [name for name, _ in model.named_modules()]
    check_patterns([*config.rank_pattern, *config.alpha_pattern], names)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not _is_target(name, config.targets):
            continue
        rows = _chosen_rows(name, module, config.parts)
        if not rows:
            continue
        r = int(_by_pattern(config.rank_pattern, name, config.r))
        most = max(module.in_features, module.out_features, USUAL_RANK)
        if r > most:
            raise InputError(
                f"LoRA rank is {r} for {name}, a layer of {module.in_features} by "
                f"{module.out_features}; expected at most {most}"
            )
        scaling = _scaling(
            _by_pattern(config.alpha_pattern, name, config.alpha), r, config.use_rslora
        )
        slices[name] = [LoRASlice(part, start, stop, r, scaling) for part, start, stop in rows]
    if not slices:
        found = sorted(
            {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        )
        raise InputError(
            f"LoRA targets {config.targets} with parts {config.parts!r} match no linear layer. "
            f"The backbone's linear layers end in: {', '.join(found) or 'it has none'}"
        )
    for name, chosen in slices.items():
        wrap(model, name, chosen, config.dropout)
    return list(slices)


def wrap(model: nn.Module, name: str, slices: list[LoRASlice], dropout: float = 0.0) -> LoRALinear:
    """Replace the linear layer ``name`` of ``model`` by one with low-rank adapters."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    layer = getattr(parent, leaf)
    if isinstance(layer, LoRALinear):
        raise InputError(f"{name} has low-rank adapters already: merge them first (fa.fold)")
    if not isinstance(layer, nn.Linear):
        raise InputError(
            f"{name} is a {type(layer).__name__}; low-rank adapters are for nn.Linear layers"
        )
    wrapped = LoRALinear(layer, slices, dropout).train(layer.training)
    setattr(parent, leaf, wrapped)
    return wrapped


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers of ``model`` that have low-rank adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def replaced_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters of ``model`` that :func:`load_peft` replaced.

    They are no longer the pretrained ones, so that an adapter's checkpoint must contain them.
    """
    return frozenset().union(*(layer.replaced for layer in lora_layers(model).values()))


def is_low_rank(name: str) -> bool:
    """Tell whether a tensor's name in a state dict is that of a low-rank weight."""
    return ".lora_A." in name or ".lora_B." in name


def claim_lora(model: nn.Module) -> None:
    """Mark the low-rank adapters of a backbone as those of the adapted model that trains them."""
    for layer in lora_layers(model).values():
        layer.claimed = True


def refuse_claimed_lora(model: nn.Module) -> None:
    """Refuse a backbone with low-rank adapters that another adapted model may have trained.

    Raises:
        InputError: it has some; the first layer is named.
    """
    claimed = [name for name, layer in lora_layers(model).items() if layer.claimed]
    if claimed:
        raise InputError(
            f"the backbone carries the low-rank adapters of another adapted model ({claimed[0]} "
            f"and {len(claimed) - 1} more): this one would start from its trained weights. Pass "
            "another copy of the pretrained backbone, or take them out first with "
            "fastadapt.lora.remove_lora(backbone)"
        )


def remove_lora(model: nn.Module) -> list[str]:
    """Put the original linear layers back in place; return the names of those that changed.

    Low-rank weights are dropped, not merged (:func:`fastadapt.fold` merges). Parameters that
    :func:`load_peft` replaced stay replaced.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)
    return list(layers)


def load_peft(model: nn.Module, folder: str | Path) -> list[str]:
    """Add a LoRA that PEFT saved to a timm model (or any module), in place.

    Reads ``adapter_config.json`` (r, lora_alpha, rank_pattern, alpha_pattern, use_rslora, bias,
    modules_to_save) and ``adapter_model.safetensors``. ``fan_in_fan_out`` is for layers that
    keep their weight transposed; on nn.Linear PEFT switches it off, and so does this.

    Args:
        model: the module that PEFT wrapped, without PEFT; fused qkv layers are ordinary targets.
        folder: what ``PeftModel.save_pretrained`` wrote.

    Returns:
        The names of the layers that got an adapter.

    Raises:
        InputError: the folder is no LoRA of a supported kind (the variant is named), a tensor
            does not fit, or its layer does not exist. The model is then unchanged.
    """
    folder = Path(folder)
    config = PeftConfig.from_dict(
        read_json(folder / "adapter_config.json"), folder / "adapter_config.json"
    )
    if (
        not (folder / "adapter_model.safetensors").is_file()
        and (folder / "adapter_model.bin").is_file()
    ):
        raise InputError(
            f"{folder} holds adapter_model.bin, a pickle: save it again with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    _refuse_variants(tensors, folder)
    check_finite(tensors, str(folder / "adapter_model.safetensors"))

    pairs: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        else:
            plain[re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name)] = tensor

    if not pairs:
        raise InputError(f"{folder} holds no low-rank weights (lora_A, lora_B)")
    modules = dict(model.named_modules())
    own = model.state_dict()
    check_patterns([*config.rank_pattern, *config.alpha_pattern], modules)
    slices = {}
    for name, pair in pairs.items():
        layer = modules.get(name)
        if layer is None:
            raise InputError(
                f"{folder} adapts {name!r}, which {type(model).__name__} does not have. "
                f"Nearest: {nearest(name, modules)}"
            )
        if not isinstance(layer, nn.Linear) or isinstance(layer, LoRALinear):
            raise InputError(
                f"{folder} adapts {name!r}, a {type(layer).__name__}; only LoRA on nn.Linear "
                "layers is supported"
            )
        if set(pair) != {"A", "B"}:
            raise InputError(f"{folder}: {name} has lora_{next(iter(pair))} without its partner")
        r = pair["A"].shape[0]
        want = {"A": (r, layer.in_features), "B": (layer.out_features, r)}
        for side, shape in want.items():
            if tuple(pair[side].shape) != shape:
                raise InputError(
                    f"{folder}: {name}.lora_{side} has shape {tuple(pair[side].shape)}; "
                    f"the layer expects {shape}"
                )
        stated = _by_pattern(config.rank_pattern, name, config.r)
        if stated != r:
            raise InputError(
                f"{folder}: adapter_config.json gives {name} rank {stated}, its tensors have {r}: "
                "the scaling alpha / r cannot be trusted"
            )
        alpha = _by_pattern(config.alpha_pattern, name, config.alpha)
        scaling = _scaling(alpha, r, config.use_rslora)
        slices[name] = [LoRASlice("all", 0, layer.out_features, r, scaling)]
    saved = {name for name in modules if ends_with_any(name, config.modules_to_save)}
    for name in sorted(saved):
        lacking = [n for n, _ in modules[name].named_parameters() if f"{name}.{n}" not in plain]
        if lacking and not any(name.startswith(f"{outer}.") for outer in saved):
            raise InputError(
                f"{folder} lists {name!r} in modules_to_save and has no weights for its "
                f"{lacking[0]}: was it saved completely?"
            )
    # PEFT saves a module of modules_to_save whole and gives it no low-rank adapter.
    replaced = {name for name in modules if any((name + ".").startswith(s + ".") for s in saved)}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    targets = config.targeted(linear)
    forgotten = [] if targets is None else sorted(targets - set(slices) - replaced)
    unasked = [] if targets is None else sorted(set(slices) - targets)
    if unasked:
        raise InputError(
            f"{folder} has low-rank weights for {unasked[0]!r}, which is none of its "
            "target_modules: PEFT would leave them out. One of its files is damaged, or of "
            "another adapter."
        )
    if forgotten:
        raise InputError(
            f"{folder} targets {forgotten[0]!r} (target_modules) and has no weights for it: "
            f"it was trained on another model than this {type(model).__name__}"
        )
    for key, tensor in plain.items():
        if key not in own:
            raise InputError(
                f"{folder} holds {key!r}, which {type(model).__name__} does not have "
                "(a classifier in modules_to_save needs the model with its classifier)"
            )
        if own[key].shape != tensor.shape:
            raise InputError(
                f"{folder}: {key} has shape {tuple(tensor.shape)}; "
                f"the model expects {tuple(own[key].shape)}"
            )

    with torch.no_grad():
        for key, tensor in plain.items():
            own[key].copy_(tensor)
        for name, chosen in slices.items():
            layer = wrap(model, name, chosen, config.dropout)
            layer.lora_A["all"].copy_(pairs[name]["A"])
            layer.lora_B["all"].copy_(pairs[name]["B"])
            layer.replaced = frozenset(plain)
    return list(slices)


def _refuse_variants(tensors: dict[str, Tensor], folder: Path) -> None:
    for key in tensors:
        if "lora_magnitude_vector" in key:
            raise InputError(f"{folder} uses DoRA ({key}), which is not supported")
        if "lora_embedding" in key:
            raise InputError(f"{folder} adapts an embedding ({key}), which is not supported")


def _is_target(name: str, targets: tuple[str, ...] | str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or ends_with_any(name, (targets,))
    return ends_with_any(name, targets)


def _chosen_rows(name: str, layer: nn.Linear, parts: str) -> list[tuple[str, int, int]]:
    """Return (pair name, first row, end row) of each low-rank pair that a linear layer gets."""
    leaf = name.rpartition(".")[2]
    fused = FUSED.get(leaf)
    if fused and parts != "qkv":
        if layer.out_features % len(fused):
            raise InputError(
                f"{name} has {layer.out_features} outputs, not {len(fused)} equal parts for "
                f"{', '.join(fused)}: adapt it whole (parts='qkv')"
            )
        width = layer.out_features // len(fused)
        return [(part, i * width, (i + 1) * width) for i, part in enumerate(fused) if part in parts]
    for part, names in PROJECTIONS.items():
        if leaf in names and part not in parts:
            return []
    return [("all", 0, layer.out_features)]


def _by_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the name, as PEFT does."""
    for key, value in pattern.items():
        if match_end(key, name):
            return value
    return default


def _scaling(alpha: float, r: int, rslora: bool) -> float:
    return alpha / math.sqrt(r) if rslora else alpha / r
