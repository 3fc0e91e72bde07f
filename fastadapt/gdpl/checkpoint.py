"""Make GDPL models by name, save what was trained, and load it onto the same frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastadapt.checkpoint import CONFIG, WEIGHTS, read_checkpoint
from fastadapt.checkpoint_reader import find_state_dict
from fastadapt.checkpoint_reader import read_checkpoint as read_foreign
from fastadapt.errors import InputError, nearest
from fastadapt.files import (
    check_finite,
    sha256_tensors,
    write_json,
    write_tensors,
)
from fastadapt.gdpl.class_tree import Tokenizer
from fastadapt.gdpl.config import FrozenParts, GDPLConfig
from fastadapt.gdpl.domain_encoder import DomainEncoder
from fastadapt.gdpl.model import GDPLModel
from fastadapt.gdpl.upstream import convert_gdpl_state_dict

FORMAT = "fastadapt-gdpl"
FORMAT_VERSION = 1


class GDPLSource(FrozenParts):
    """Name the frozen parts of a model, and make the model."""

    def create(self, class_names: Sequence[str], config: GDPLConfig | None = None) -> GDPLModel:
        """Make a new model. Raises InputError for an unknown name or unavailable weights."""
        clip, tokenizer = create_clip(self.clip, self.clip_weights)
        encoder: str | int | DomainEncoder = self.domain_encoder
        if isinstance(encoder, str):
            encoder = DomainEncoder(
                encoder,
                normalization=self.domain_normalization,
                weights=self.domain_weights,
                input_size=None if self.domain_size is None else (3, *(self.domain_size,) * 2),
            )
        return GDPLModel(clip, encoder, class_names, config, tokenizer=tokenizer)


def create_clip(name: str, weights: str | None = None) -> tuple[nn.Module, Tokenizer]:
    """Make an open_clip model and its tokenizer.

    Raises:
        InputError: open_clip is not installed, does not know the name or the weights, or cannot
            load them.
    """
    try:
        import open_clip
    except ImportError:
        raise InputError(
            "GDPL needs open_clip: install it with pip install 'fastadapt[clip]'"
        ) from None
    comes_with_weights = name.startswith(("hf-hub:", "local-dir:"))
    if not comes_with_weights:
        if name not in open_clip.list_models():
            near = nearest(name, open_clip.list_models())
            raise InputError(f"open_clip has no model {name!r}. Nearest: {near}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if weights is None:
            raise InputError(
                f"{name} needs weights: a local file, or one of {', '.join(tags) or 'none'} "
                "(`clip_weights=...`)"
            )
        if weights not in tags and not Path(weights).is_file():
            raise InputError(
                f"{weights!r} is neither a file nor weights that open_clip knows for {name}: "
                f"expected a path, or one of {', '.join(tags) or 'none'}"
            )
    elif weights is not None:
        raise InputError(f"{name} brings its own weights; leave out `clip_weights`")
    try:
        clip = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the CLIP model {name} cannot be loaded: {reason}") from error
    return clip, tokenizer


def trained_state(model: GDPLModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint: prompts, quaternion networks, low-rank weights."""
    parts = ("prompt_learner.", "low_rank.")
    return {k: tensor for k, tensor in model.state_dict().items() if k.startswith(parts)}


def fingerprints(model: GDPLModel) -> dict[str, str | None]:
    """Hash the frozen weights that a checkpoint depends on."""
    encoder = model.domain_encoder
    return {
        "clip": sha256_tensors(model.clip.state_dict()),
        "domain_encoder": None if encoder is None else sha256_tensors(encoder.state_dict()),
    }


def save_gdpl(
    model: GDPLModel,
    folder: str | Path,
    source: GDPLSource | None = None,
    *,
    frozen: dict[str, str | None] | None = None,
    **extra: Any,
) -> None:
    """Write ``config.json`` and ``adapter.safetensors``; each is written whole or not at all.

    Args:
        model: with its low-rank updates not merged.
        folder: made if need be.
        source: how to make the frozen parts again; without it, :func:`load_gdpl` must be given
            them.
        frozen: :func:`fingerprints` of the frozen parts, if they are no longer what they were.
        **extra: more keys for config.json.

    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    folder = Path(folder)
    state = trained_state(model)
    check_finite(state, "the model")
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "source": None if source is None else asdict(source),
        "fingerprints": frozen or fingerprints(model),
        "feature_dim": model.prompt_learner.feature_dim,
        "gdpl": model.config.to_dict(),
        "class_names": list(model.class_names),
        **extra,
    }
    write_tensors(folder / WEIGHTS, state)
    write_json(folder / CONFIG, config)


def load_gdpl(
    folder: str | Path,
    clip: nn.Module | None = None,
    domain_encoder: nn.Module | int | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    class_names: Sequence[str] | None = None,
    clip_weights: str | None = None,
    domain_weights: str | None = None,
) -> GDPLModel:
    """Rebuild a model from what :func:`save_gdpl` wrote, in evaluation mode.

    Args:
        folder: holds ``config.json`` and ``adapter.safetensors``.
        clip, domain_encoder, tokenizer: as for :class:`GDPLModel`; needed together if the model
            was not made by names.
        class_names: other classes than those it was trained on.
        clip_weights, domain_weights: local files of the CLIP model's and the domain encoder's
            weights, where the recorded ones are gone.

    Raises:
        InputError: a file is missing, damaged or of a newer version; the frozen weights are
            others; a tensor is missing, unexpected, not finite, or has another shape.
    """
    folder = Path(folder)
    config, state = read_checkpoint(folder, FORMAT, "GDPL model", FORMAT_VERSION)
    try:
        settings = GDPLConfig.from_dict(config["gdpl"], f"{folder / CONFIG}, gdpl")
        names = class_names or config["class_names"]
        source, recorded = config["source"], config["fingerprints"]
    except KeyError as error:
        raise InputError(f"{folder / CONFIG} lacks the key {error}") from None
    if clip is None and source is None:
        raise InputError(
            f"{folder} was made on modules that fastadapt cannot build by name: pass the same "
            "ones, load_gdpl(folder, clip, domain_encoder, tokenizer=...)"
        )
    if clip is None:
        source = GDPLSource.from_dict(source, f"{folder / CONFIG}, source")
        if clip_weights is not None:
            source = replace(source, clip_weights=clip_weights)
        if domain_weights is not None:
            source = replace(source, domain_weights=domain_weights)
        model = source.create(names, settings)
    else:
        encoder = config["feature_dim"] if domain_encoder is None else domain_encoder
        model = GDPLModel(clip, encoder, names, settings, tokenizer=tokenizer)
    for part, fingerprint in fingerprints(model).items():
        if fingerprint is not None and fingerprint != recorded[part]:
            raise InputError(
                f"{folder} was trained with other weights of the {part.replace('_', ' ')} than "
                "these: give the ones that it was trained with"
            )
    _load_trained(model, state, str(folder / WEIGHTS))
    return model.eval()


def load_upstream(model: GDPLModel, checkpoint: str | Path | dict[str, Any]) -> GDPLModel:
    """Load a checkpoint of the paper's code into a model, in place.

    Args:
        model: made with the checkpoint's settings, around the CLIP model and the domain encoder
            that it was trained with.
        checkpoint: a file that upstream's trainer wrote, or what it holds: a state dict of
            upstream's ``CustomCLIP``, alone or beside optimizer and scheduler.

    Raises:
        InputError: the file cannot be read; a part is missing or foreign, or has another shape
            than the model's (another depth, rank, context or domain encoder); it is named.
    """
    where = "the checkpoint" if isinstance(checkpoint, dict) else str(checkpoint)
    if isinstance(checkpoint, dict):
        found = find_state_dict(checkpoint, where)
    else:
        found = read_foreign(checkpoint)
    state = convert_gdpl_state_dict(found.state)
    check_finite(state, where)
    _load_trained(model, state, where)
    return model


def _load_trained(model: GDPLModel, state: dict[str, Tensor], where: str) -> None:
    """Load exactly the trained tensors. Raises InputError naming the first that does not fit."""
    own = trained_state(model)
    for name in sorted(own.keys() | state.keys()):
        if name not in own or name not in state:
            problem = "unexpected" if name in state else "missing"
            raise InputError(f"{where}: {name} is {problem}")
        if own[name].shape != state[name].shape:
            raise InputError(
                f"{where}: {name} has shape {tuple(state[name].shape)}; the model "
                f"expects {tuple(own[name].shape)}"
            )
    model.load_state_dict(state, strict=False)
