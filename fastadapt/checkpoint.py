"""Save and load adapters, and convert upstream's checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel, adapt
from fastadapt.config import AdaptConfig
from fastadapt.errors import InputError
from fastadapt.files import (
    check_finite,
    read_json,
    read_tensors,
    sha256_tensors,
    write_json,
    write_tensors,
)
from fastadapt.layers.lora import LoRASlice
from fastadapt.lora import lora_layers, wrap

CONFIG = "config.json"
WEIGHTS = "adapter.safetensors"
FORMAT, FORMAT_VERSION = "fastadapt-adapter", 1


def trained_state(model: AdaptedModel) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint must hold beside the pretrained backbone.

    Adapter, head and low-rank adapters; what a PEFT folder replaced; the whole backbone once it
    was unfrozen.
    """
    changed = {f"backbone.{name}" for name in model.replaced_parameters()}

    def kept(name: str) -> bool:
        if model.backbone_trained or not name.startswith("backbone."):
            return True
        return ".lora_A." in name or ".lora_B." in name or _plain(name) in changed

    return {name: tensor for name, tensor in model.state_dict().items() if kept(name)}


def backbone_fingerprint(model: AdaptedModel) -> str:
    """Hash the pretrained weights that the adapter depends on."""
    left_out = {f"backbone.{name}" for name in model.replaced_parameters()}
    tensors = {
        _plain(name): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("backbone.") and ".lora_A." not in name and ".lora_B." not in name
    }
    return sha256_tensors({n: t for n, t in tensors.items() if n not in left_out})


def save_adapter(model: AdaptedModel, folder: str | Path, **extra: Any) -> None:
    """Write ``config.json`` and ``adapter.safetensors``; each is written whole or not at all.

    Args:
        model: an adapted model. While its backbone is frozen, only what was added is written.
        folder: made if need be.
        **extra: more keys for config.json (a training run's settings, say).

    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    folder = Path(folder)
    state = trained_state(model)
    check_finite(state, "the model")
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "backbone": {
            **model.source,
            "trained": model.backbone_trained,
            "fingerprint": None if model.backbone_trained else backbone_fingerprint(model),
        },
        "adapt": {**model.config.to_dict(), "lora": None},
        "lora_layers": {
            name: {"dropout": layer.dropout.p, "slices": [vars(s) for s in layer.slices]}
            for name, layer in lora_layers(model.backbone).items()
        },
        "changed": sorted(model.replaced_parameters()),
        "num_classes": model.num_classes,
        **extra,
    }
    write_tensors(folder / WEIGHTS, state)
    write_json(folder / CONFIG, config)


def load_adapter(
    folder: str | Path,
    backbone: nn.Module | None = None,
    *,
    weights: str | None = None,
    features: Any = None,
    device: torch.device | str | None = None,
) -> AdaptedModel:
    """Rebuild an adapted model from what :func:`save_adapter` wrote, in evaluation mode.

    Args:
        folder: holds ``config.json`` and ``adapter.safetensors``.
        backbone: the pretrained backbone; needed if the adapter was made on a module, optional if
            it was made by name.
        weights: a local file of the backbone's weights, where the recorded one is gone.
        features: the feature function, if the adapter was made with one.
        device: where to put the model; the backbone's if ``None``.

    Raises:
        InputError: a file is missing, damaged or of a newer version; the adapter belongs to another
            backbone; a tensor is missing, unexpected, not finite, or has another shape.
    """
    folder = Path(folder)
    config, state = read_checkpoint(folder, FORMAT, "fastadapt adapter", FORMAT_VERSION)
    try:
        source, num_classes = config["backbone"], config["num_classes"]
        settings = AdaptConfig.from_dict(config["adapt"], f"{folder / CONFIG}, adapt")
        low_rank = config["lora_layers"]
    except KeyError as error:
        raise InputError(f"{folder / CONFIG} lacks the key {error}") from None
    if features is not None:
        settings = AdaptConfig(**{**vars(settings), "features": features})
    # A checkpoint that holds the whole backbone needs no pretrained weights to start from.
    trained = source["trained"]
    if backbone is None and source["kind"] != "timm":
        raise InputError(
            f"{folder} was made on a {source['name']} that fastadapt cannot build by name: "
            "pass the same backbone, load_adapter(folder, backbone=...)"
        )
    if backbone is not None:
        model = adapt(backbone, settings, num_classes)
    else:
        file = None if trained else weights or source["weights"]
        if file is not None and not Path(file).is_file():
            raise InputError(
                f"{folder} stands on the weights {file}, which are not there: say where they are "
                "with `weights=...`"
            )
        pretrained = source["pretrained"] and not trained
        model = adapt(source["name"], settings, num_classes, pretrained=pretrained, weights=file)
    model.source = {k: v for k, v in source.items() if k not in ("trained", "fingerprint")}
    model.backbone_trained = trained
    model.replaced = frozenset(config["changed"])
    for name, layer in low_rank.items():
        wrap(model.backbone, name, [LoRASlice(**s) for s in layer["slices"]], layer["dropout"])
    if not trained and backbone_fingerprint(model) != source["fingerprint"]:
        raise InputError(
            f"{folder} was trained on other weights of {source['name']} than these: the adapter "
            "would give wrong results. Give the weights that it was trained on."
        )
    load_trained_state(model, state, str(folder / WEIGHTS))
    model.freeze()
    if device is not None:
        model.to(device)
    return model.eval()


def read_checkpoint(
    folder: Path, kind: str, what: str, version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read ``config.json`` and ``adapter.safetensors`` of a folder.

    Args:
        folder: holds both.
        kind: the ``format`` that the configuration must state.
        what: that, in words.
        version: the newest version of it that can be read.

    Raises:
        InputError: a file is missing, damaged, of another kind or newer; a tensor is not finite.
    """
    config = read_json(folder / CONFIG)
    if config.get("format") != kind:
        raise InputError(f"{folder / CONFIG} is no {what}'s configuration")
    if config.get("version", 0) > version:
        raise InputError(
            f"{folder} was written by a newer fastadapt (format {config['version']}, this one "
            f"reads up to {version}): update fastadapt"
        )
    state, _ = read_tensors(folder / WEIGHTS)
    check_finite(state, str(folder / WEIGHTS))
    return config, state


def load_trained_state(model: AdaptedModel, state: dict[str, Tensor], source: str) -> None:
    """Load what :func:`trained_state` returned; nothing is changed unless all of it fits."""
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own:
            raise InputError(f"{source} holds {name!r}, which this model does not have")
        if own[name].shape != tensor.shape:
            raise InputError(
                f"{source}: {name} has shape {tuple(tensor.shape)}; "
                f"the model expects {tuple(own[name].shape)}"
            )
    missing = sorted(set(trained_state(model)) - set(state))
    if missing:
        raise InputError(f"{source} lacks {len(missing)} tensors, {missing[0]!r} first")
    model.load_state_dict(state, strict=False)


# Upstream's names inside the adapter, and the names here.
_RENAMED = (
    (r"^(?:CLAdapter_layers\.)?da_resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.attn\.tran_ms$", ".attn.transforms"),
    (r"\.attn\.down_layer\.", ".attn.down."),
    (r"\.attn\.up_layer\.", ".attn.up."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_ADAPTER_KEY = re.compile(
    r"norm[12]\.(weight|bias)|blocks\.\d+\.(ln_[12]|mlp\.fc[12]|attn\.(down|up))\.(weight|bias)"
    r"|blocks\.\d+\.attn\.(centers|transforms)"
)


def convert_cladapter_state_dict(
    upstream: dict[str, Tensor], part: Literal["backbone", "adapter", "head"] | None = None
) -> dict[str, Tensor]:
    """Rename a checkpoint of the paper's code (qklee-lz/CLAdapter) to this library's keys.

    Args:
        upstream: the whole state dict (``backbone.*``, ``post.*``, ``head.*``), or its adapter
            alone, with or without the prefixes ``module.``, ``post.`` and ``CLAdapter_layers.``.
            ``attn.proj``, which upstream saves and never uses in channel mode, is dropped.
        part: ``None`` for the keys of an adapted model; ``"adapter"`` for those of
            :class:`fastadapt.CLAdapter` alone (likewise ``"backbone"``, ``"head"``).

    Returns:
        The same tensors under other names.

    Raises:
        InputError: a key is none of upstream's (it is named), nothing is left for ``part``, or the
            checkpoint is of upstream's token mode with its extra projection.
    """
    if part not in (None, "backbone", "adapter", "head"):
        raise InputError(f"part is {part!r}; expected 'backbone', 'adapter', 'head' or None")
    parts: dict[str, dict[str, Tensor]] = {"backbone": {}, "adapter": {}, "head": {}}
    for original, tensor in upstream.items():
        key = original.removeprefix("module.")
        where, _, rest = key.partition(".")
        if where in ("backbone", "head"):
            parts[where][rest] = tensor
            continue
        key = key.removeprefix("post.")
        for pattern, ours in _RENAMED:
            key = re.sub(pattern, ours, key)
        if re.fullmatch(r"blocks\.\d+\.attn\.proj\.(weight|bias)", key):
            block = key.partition(".attn.")[0]
            renamed = f"{block.replace('blocks', 'da_resblocks')}.attn.down_layer.weight"
            if not any(name.endswith(renamed) for name in upstream):
                raise InputError(
                    f"{original}: this checkpoint is of upstream's token mode, which ends in a "
                    "projection that fastadapt's token mode does not have"
                )
            continue
        if not _ADAPTER_KEY.fullmatch(key):
            raise InputError(
                f"{original!r} is no key of an upstream CLAdapter checkpoint (backbone.*, post.*, "
                "head.*)"
            )
        parts["adapter"][key] = tensor
    if part is not None:
        if not parts[part]:
            raise InputError(
                f"the checkpoint has no {part}; its first key is {next(iter(upstream), None)!r}"
            )
        return parts[part]
    return {f"{name}.{key}": t for name, sub in parts.items() for key, t in sub.items()}


def _plain(name: str) -> str:
    """Return a parameter's name without the wrapper of low-rank adapters."""
    return name.replace(".base.weight", ".weight").replace(".base.bias", ".bias")
