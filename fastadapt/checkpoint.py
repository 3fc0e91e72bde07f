"""Save and load adapters, and convert upstream's checkpoints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel, adapt
from fastadapt.backbones import (
    create_backbone,
    feature_function,
    image_tower,
    stated_prefix_tokens,
)
from fastadapt.checkpoint_reader import find_state_dict
from fastadapt.checkpoint_reader import read_checkpoint as read_foreign
from fastadapt.config import AdaptConfig
from fastadapt.errors import InputError, counted
from fastadapt.files import (
    CONTENT,
    check_finite,
    content_sha256,
    read_json,
    read_tensors,
    seal,
    sha256_file,
    sha256_tensors,
    write_json,
    write_tensors,
)
from fastadapt.layers.calibrated_linear import CalibratedLinear
from fastadapt.lora import claim_lora, is_low_rank, lora_layers, wrap
from fastadapt.saved_adapter import DTYPES, SavedAdapter, SavedBackbone
from fastadapt.trainable import COMPILED, plain_name, uncompiled

CONFIG = "config.json"
WEIGHTS = "adapter.safetensors"
FORMAT, FORMAT_VERSION = "fastadapt-adapter", 2  # since 2 with a hash of the configuration
FORMATS = (FORMAT, "fastadapt-gdpl")  # of configurations that folders of ours may have


def trained_state(model: AdaptedModel) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint must hold beside the pretrained backbone.

    They are the adapter's, the head's and the low-rank ones; what a PEFT folder replaced or
    :meth:`AdaptedModel.unfreeze` unfroze; the whole backbone once it was unfrozen. Names are those
    of a model that is not compiled.
    """
    changed = {f"backbone.{name}" for name in model.replaced_tensors()}

    def kept(name: str) -> bool:
        if model.backbone_trained or not name.startswith("backbone."):
            return True
        return is_low_rank(name) or plain_name(name) in changed

    return {
        name.replace(COMPILED, ""): tensor
        for name, tensor in model.state_dict().items()
        if kept(name)
    }


def frozen_state(model: AdaptedModel) -> dict[str, Tensor]:
    """Return the pretrained tensors that a checkpoint does not hold, by plain name."""
    held = {plain_name(name) for name in trained_state(model)}
    tensors = {
        plain_name(name): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.startswith("backbone.") and not is_low_rank(name)
    }
    return {name: tensor for name, tensor in tensors.items() if name not in held}


def backbone_fingerprint(model: AdaptedModel) -> str:
    """Hash the pretrained weights that the adapter depends on."""
    return sha256_tensors(frozen_state(model))


def save_adapter(model: AdaptedModel, folder: str | Path, **extra: Any) -> None:
    """Write ``config.json`` and ``adapter.safetensors``; each is written whole or not at all.

    What was added is written, and what was trained of the backbone: nothing while it is frozen,
    the last blocks after ``unfreeze(last=…)``, all of it after ``unfreeze()``.

    Args:
        model: an adapted model, compiled or not, in any precision.
        folder: made if need be.
        **extra: more keys for config.json (a training run's settings, say).

    Raises:
        InputError: it is no adapted model, a tensor holds NaN or infinity, or the folder has a
            configuration of something else.
    """
    given, folder = uncompiled(model), Path(folder)
    if not isinstance(given, AdaptedModel):
        raise InputError(
            f"the model is a {type(given).__name__}; expected what fa.adapt or fa.load_adapter "
            "returned"
        )
    model = given
    check_own_folder(folder)
    state = trained_state(model)
    check_finite(state, "the model")
    write_tensors(folder / WEIGHTS, state)
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "backbone": {
            **model.source,
            "trained": model.backbone_trained,
            "fingerprint": None if model.backbone_trained else backbone_fingerprint(model),
            "dtypes": _dtypes(frozen_state(model)),
        },
        "adapt": {
            **model.config.to_dict(),
            "lora": None,
            "num_prefix_tokens": model.spec.num_prefix_tokens,
        },
        "lora_layers": {
            plain_name(name): {
                "dropout": layer.dropout.p,
                "slices": [vars(s) for s in layer.slices],
            }
            for name, layer in lora_layers(model.backbone).items()
        },
        "changed": sorted(model.replaced_tensors()),
        "num_classes": model.num_classes,
        "temperature": temperature_of(model),
        "weights_sha256": sha256_file(folder / WEIGHTS),
        **extra,
    }
    write_json(folder / CONFIG, seal(config))


def check_own_folder(folder: Path) -> None:
    """Refuse a folder whose ``config.json`` is not of this package: Hugging Face's, for one.

    Raises:
        InputError: as said.
    """
    if (folder / CONFIG).exists() and not is_own_config(folder / CONFIG):
        raise InputError(
            f"{folder / CONFIG} was not written by fastadapt: save the model to another folder"
        )


def is_own_config(path: Path) -> bool:
    """Say whether a configuration's ``format`` is one of this package's."""
    try:
        return read_json(path).get("format") in FORMATS
    except InputError:
        return False


def load_adapter(
    folder: str | Path,
    backbone: nn.Module | None = None,
    *,
    weights: str | None = None,
    features: Any = None,
    device: torch.device | str | None = None,
) -> AdaptedModel:
    """Rebuild an adapted model from what :func:`save_adapter` wrote, in evaluation mode.

    Every tensor has the dtype that it was saved in; a backbone that is given is cast to it.

    Args:
        folder: holds ``config.json`` and ``adapter.safetensors``.
        backbone: the pretrained backbone; needed if the adapter was made on a module, optional if
            it was made by name.
        weights: a local file of the backbone's weights, where the recorded one is gone.
        features: the feature function, if the adapter was made with one.
        device: where to put the model; the backbone's if ``None``.

    Raises:
        InputError: a file is missing, damaged or of a newer version; the two files are not of one
            save; the adapter belongs to another backbone; a tensor is missing, unexpected, not
            finite, or has another shape.
    """
    folder = Path(folder)
    config, state = read_checkpoint(folder, FORMAT, "fastadapt adapter", FORMAT_VERSION)
    saved = SavedAdapter.from_dict(config, folder / CONFIG)
    saved.check_sizes(state, folder / WEIGHTS)
    settings, on = saved.settings, saved.backbone
    if features is not None:
        settings = AdaptConfig(**{**vars(settings), "features": features})
    # A checkpoint that holds the whole backbone needs no pretrained weights to start from.
    if backbone is None and on.kind != "timm":
        raise InputError(
            f"{folder} was made on a {on.name} that fastadapt cannot build by name: "
            "pass the same backbone, load_adapter(folder, backbone=...)"
        )
    if backbone is None:
        file = None if on.trained else weights or on.weights
        if file is not None and not Path(file).is_file():
            raise InputError(
                f"{folder} needs the weights {file}, which are not there: say where they are "
                "with `weights=...`"
            )
        held = {n.removeprefix("backbone."): t for n, t in state.items() if "backbone." in n}
        backbone = create_backbone(
            on.name,
            pretrained=on.pretrained and not on.trained,
            weights=file,
            image_size=None if settings.input_size is None else settings.input_size[-1],
            state=held if on.trained else None,
            drop_path=settings.drop_path,
        )
    elif settings.drop_path:  # a backbone that is given drops blocks as it was made
        settings = AdaptConfig(**{**vars(settings), "drop_path": 0.0})
    if settings.num_prefix_tokens is None:  # older versions took 0 where the backbone says nothing
        module = image_tower(backbone).module
        stated = stated_prefix_tokens(module, feature_function(module, settings.features))
        settings = AdaptConfig(**{**vars(settings), "num_prefix_tokens": stated or 0})
    model = adapt(backbone, settings, saved.num_classes)
    model.source = on.source()
    model.backbone_trained = on.trained
    model.replaced = frozenset(saved.changed)
    for name, layer in saved.lora_layers.items():
        wrap(model.backbone, name, layer.slices, layer.dropout)
    claim_lora(model.backbone)
    if not on.trained:
        _check_backbone(model, on, state, folder)
    load_trained_state(model, state, str(folder / WEIGHTS))
    check_weights_hash(folder, config)
    set_temperature(model, saved.temperature)
    model.freeze()
    if device is not None:
        model.to(device)
    return model.eval()


def temperature_of(model: AdaptedModel) -> float:
    """Return what the model's logits are divided by; 1 unless it was calibrated."""
    return model.head.temperature if isinstance(model.head, CalibratedLinear) else 1.0


def set_temperature(model: AdaptedModel, temperature: float) -> None:
    """Have the model divide its logits by a temperature, which replaces an earlier one."""
    if isinstance(model.head, nn.Linear) and temperature != temperature_of(model):
        model.head = CalibratedLinear.of(model.head, temperature)


def _dtypes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the most frequent dtype under an empty name, and the exceptions by name."""
    found = {n: str(t.dtype).removeprefix("torch.") for n, t in tensors.items() if _is_float(t)}
    if not found:
        return {}
    usual = Counter(found.values()).most_common(1)[0][0]
    return {"": usual, **{name: dtype for name, dtype in found.items() if dtype != usual}}


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _check_backbone(
    model: AdaptedModel, saved: SavedBackbone, state: dict[str, Tensor], folder: Path
) -> None:
    """Cast the pretrained weights as they were when saved, and compare their hash.

    Raises:
        InputError: they are other weights.
    """
    before = _dtypes(frozen_state(model)).get("", "float32")
    if saved.dtypes is not None:
        _cast(model, saved.dtypes)
    if backbone_fingerprint(model) == saved.fingerprint:
        return
    if saved.dtypes is None:  # an older checkpoint: its tensors tell what the model was cast to
        _cast(model, {"": _dtypes(state).get("", before)})
        if backbone_fingerprint(model) == saved.fingerprint:
            return
    wanted = (saved.dtypes or {}).get("", before)
    hint = ""
    if wanted != before and torch.finfo(DTYPES[before]).bits < torch.finfo(DTYPES[wanted]).bits:
        hint = f" (these are {before}, the ones that it was trained on {wanted})"
    raise InputError(
        f"{folder} was trained on other weights of {saved.name} than these{hint}: the "
        "adapter would give wrong results. Give the weights that it was trained on."
    )


def _cast(model: AdaptedModel, dtypes: Mapping[str, str]) -> None:
    for name, tensor in frozen_state(model).items():
        wanted = DTYPES.get(dtypes.get(name, dtypes.get("", "")))
        if wanted is not None and _is_float(tensor):
            tensor.data = tensor.data.to(wanted)


def check_weights_hash(folder: Path, config: dict[str, Any]) -> None:
    """Check that ``adapter.safetensors`` is the file that ``config.json`` was written with.

    Raises:
        InputError: it is another one.
    """
    stated = config.get("weights_sha256")  # which older checkpoints do not have
    if stated is not None and stated != sha256_file(folder / WEIGHTS):
        raise InputError(
            f"{folder / CONFIG} was not written with {folder / WEIGHTS}: one of them is damaged, "
            "or from another run. Save the model again."
        )


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
    if type(config.get("version")) is not int:
        raise InputError(f"{folder / CONFIG} has version {config.get('version')!r}; expected 1")
    if config["version"] > version:
        raise InputError(
            f"{folder} was written by a newer fastadapt (format {config['version']}, this one "
            f"reads up to {version}): update fastadapt"
        )
    if (CONTENT in config or config["version"] > 1) and (
        config.get(CONTENT) != content_sha256(config)
    ):
        raise InputError(
            f"{folder / CONFIG} was changed: its content is not what its {CONTENT} says. Save the "
            "model again, or put back an intact copy."
        )
    state, _ = read_tensors(folder / WEIGHTS)
    check_finite(state, str(folder / WEIGHTS))
    return config, state


def load_trained_state(model: AdaptedModel, state: dict[str, Tensor], source: str) -> None:
    """Load what :func:`trained_state` returned; nothing is changed unless all of it fits."""
    whole = model.state_dict(keep_vars=True)
    own = {name.replace(COMPILED, ""): tensor for name, tensor in whole.items()}
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
        raise InputError(f"{source} lacks {counted(len(missing), 'tensor')}, {missing[0]!r} first")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].data = own[name].data.to(tensor.dtype)
            own[name].copy_(tensor)


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


# Where timm has the classifier, which upstream's backbone keeps and its forward pass never reaches.
_BACKBONE_CLASSIFIER = re.compile(r"(head|head\.fc|fc|classifier|head_dist)\.(weight|bias)")


def convert_cladapter_state_dict(
    upstream: dict[str, Any] | str | Path,
    part: Literal["backbone", "adapter", "head"] | None = None,
) -> dict[str, Tensor]:
    """Rename a checkpoint of the paper's code (qklee-lz/CLAdapter) to this library's keys.

    Args:
        upstream: a file of upstream's trainer, or what it holds: the whole state dict
            (``backbone.*``, ``post.*``, ``head.*``), alone or below ``"state_dict"``, or its
            adapter alone, with or without the prefixes ``module.``, ``post.`` and
            ``CLAdapter_layers.``. ``attn.proj``, which upstream saves and never uses in channel
            mode, is dropped, and so is the backbone's own classifier (``backbone.head.*``), which
            upstream keeps and never calls.
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
    if isinstance(upstream, dict):
        state = find_state_dict(upstream, "the checkpoint").state
    else:
        state = read_foreign(upstream).state
    for original, tensor in state.items():
        key = original
        where, _, rest = key.partition(".")
        if where == "backbone" and _BACKBONE_CLASSIFIER.fullmatch(rest):
            continue
        if where in ("backbone", "head"):
            parts[where][rest] = tensor
            continue
        key = key.removeprefix("post.")
        for pattern, ours in _RENAMED:
            key = re.sub(pattern, ours, key)
        if re.fullmatch(r"blocks\.\d+\.attn\.proj\.(weight|bias)", key):
            block = key.partition(".attn.")[0]
            renamed = f"{block.replace('blocks', 'da_resblocks')}.attn.down_layer.weight"
            if not any(name.endswith(renamed) for name in state):
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
                f"the checkpoint has no {part}; its first key is {next(iter(state), None)!r}"
            )
        return parts[part]
    return {f"{name}.{key}": t for name, sub in parts.items() for key, t in sub.items()}
