"""Read PEFT's ``adapter_config.json``: every value typed and bounded, and variants refused.

Keys that PEFT's LoRA does not know are ignored, as PEFT ignores them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadapt.config import LoRAConfig
from fastadapt.errors import InputError
from fastadapt.patterns import check_patterns

# What changes the result in a way of its own, by the key that switches it on.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "megatron_config": "Megatron LoRA",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "a bias on lora_B",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
}
TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
BIASES = ("none", "all", "lora_only")
# Of these only the type counts: they say how the training began, or where the model is from.
_TYPES: dict[str, tuple[type, ...]] = {
    "auto_mapping": (dict,),
    "base_model_name_or_path": (str,),
    "corda_config": (dict,),
    "eva_config": (dict,),
    "exclude_modules": (list, str),
    "fan_in_fan_out": (bool,),
    "inference_mode": (bool,),
    "init_lora_weights": (bool, str),
    "layers_pattern": (list, str),
    "layers_to_transform": (list, int),
    "loftq_config": (dict,),
    "lora_ga_config": (dict,),
    "megatron_core": (str,),
    "modules_to_save": (list,),
    "peft_version": (str,),
    "qalora_group_size": (int,),
    "revision": (str,),
    "target_modules": (list, str),
}
_LISTS_OF_NAMES = ("exclude_modules", "layers_pattern", "modules_to_save", "target_modules")


@dataclass(frozen=True)
class PeftConfig:
    """Hold PEFT's ``adapter_config.json``.

    Attributes:
        r, alpha, dropout, use_rslora, rank_pattern, alpha_pattern: as in :class:`LoRAConfig`.
        modules_to_save: ends of the names of modules that were saved whole.
        targets, excluded: ends of the names of adapted layers and of those that are left out, or
            a regular expression for whole names.
        blocks: numbers of the adapted blocks; ``None`` for all.
        block_patterns: regular expressions of what stands before a block's number.
    """

    r: int
    alpha: float
    dropout: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: tuple[str, ...]
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    blocks: tuple[int, ...] | None
    block_patterns: tuple[str, ...]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: Path) -> PeftConfig:
        """Read the values of a file.

        Raises:
            InputError: one has another type or is out of its range, or is of a variant of LoRA
                that is not supported; the variant is named.
        """
        _check_kind(values, where)
        settings = {
            "r": values.get("r", 8),
            "alpha": values.get("lora_alpha", 8),
            "dropout": values.get("lora_dropout", 0.0),
            "use_rslora": values.get("use_rslora", False),
            "rank_pattern": _or_none(values.get("rank_pattern"), {}),
            "alpha_pattern": _or_none(values.get("alpha_pattern"), {}),
        }
        checked = LoRAConfig.from_dict(settings, str(where))
        _check_types(values, where)
        if not values.get("target_modules"):
            raise InputError(f"{where}: target_modules is empty; expected the adapted layers")
        blocks = values.get("layers_to_transform")
        patterns = values.get("layers_pattern") or ()
        return cls(
            checked.r,
            checked.alpha,
            checked.dropout,
            checked.use_rslora,
            checked.rank_pattern,
            checked.alpha_pattern,
            tuple(values.get("modules_to_save") or ()),
            _names(values["target_modules"]),
            _names(values.get("exclude_modules") or ()),
            None if blocks in (None, []) else _numbers(blocks),
            (patterns,) if isinstance(patterns, str) else tuple(patterns),
        )

    def targeted(self, names: Iterable[str]) -> set[str] | None:
        """Return which of the linear layers PEFT adapts; ``None`` where that cannot be told.

        Raises:
            InputError: a regular expression may take for ever.
        """
        if self.targets == "all-linear":
            return None
        names = list(names)
        expressions = [e for e in (self.targets, self.excluded) if isinstance(e, str)]
        check_patterns([*expressions, *self.block_patterns], names)
        return {
            name
            for name in names
            if self._is_target(name) and not (self.excluded and _matches(self.excluded, name))
        }

    def _is_target(self, name: str) -> bool:
        if not _matches(self.targets, name):
            return False
        if self.blocks is None or isinstance(self.targets, str) or name in self.targets:
            return True
        # As PEFT: the first number after a name of its own, or after one of the patterns.
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.block_patterns]
        for pattern in patterns or [r".*?\.[^.]*"]:
            found = re.match(rf"{pattern}\.(?P<block>\d+)\.", name)
            if found is not None:
                return int(found["block"]) in self.blocks
        return False


def ends_with_any(name: str, ends: Iterable[str]) -> bool:
    """Say whether a module's name is one of the ends, or ends in one after a dot."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _matches(chosen: tuple[str, ...] | str, name: str) -> bool:
    if not isinstance(chosen, str):
        return ends_with_any(name, chosen)
    return re.fullmatch(chosen, name) is not None


def _names(value: list[str] | tuple[str, ...] | str) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else tuple(value)


def _numbers(value: list[int] | int) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _or_none(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_kind(values: dict[str, Any], where: Path) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"{where.parent} is a PEFT adapter of type {kind!r}; only LORA is supported"
        )
    for key, variant in VARIANTS.items():
        if values.get(key):
            raise InputError(f"{where.parent} uses {variant} ({key}), which is not supported")
        off: tuple[Any, ...] = (None, [])
        if key.startswith("use_") or key == "lora_bias":
            off = (None, False)
        elif key.endswith("_config"):
            off = (None,)
        if not any(type(values.get(key)) is type(value) for value in off):
            raise InputError(f"{where}: {key} is {values[key]!r}; expected null")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise InputError(
            f"{where.parent} was initialised with {init}, which also changes the base weights; "
            "convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion) first"
        )


def _check_types(values: dict[str, Any], where: Path) -> None:
    choices: dict[str, tuple[Any, ...]] = {"bias": BIASES, "task_type": (*TASKS, None)}
    for key, known in choices.items():
        value = values.get(key, known[-1])
        if not isinstance(value, str | None) or value not in known:
            said = ", ".join(map(str, known))
            raise InputError(f"{where}: {key} is {value!r}; expected one of {said}")
    for key, kinds in _TYPES.items():
        value = values.get(key)
        fits = value is None or type(value) in kinds
        if fits and isinstance(value, list):
            inside = str if key in _LISTS_OF_NAMES else int
            fits = all(type(part) is inside for part in value)
        if not fits:
            words = " or ".join(kind.__name__ for kind in kinds)
            names = " of names" if key in _LISTS_OF_NAMES else ""
            raise InputError(f"{where}: {key} is {value!r}; expected a {words}{names}"[:300])
