"""Make GDPL models by name, save what was trained, and load it onto the same frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastadapt.checkpoint import (
    CONFIG,
    WEIGHTS,
    check_own_folder,
    check_weights_hash,
    read_checkpoint,
)
from fastadapt.checkpoint_reader import find_state_dict
from fastadapt.checkpoint_reader import read_checkpoint as read_foreign
from fastadapt.errors import InputError
from fastadapt.files import (
    check_finite,
    seal,
    sha256_file,
    sha256_tensors,
    write_json,
    write_tensors,
)
from fastadapt.gdpl.class_tree import Tokenizer
from fastadapt.gdpl.clip import activation
from fastadapt.gdpl.clip_by_name import create_clip
from fastadapt.gdpl.config import FrozenParts, GDPLConfig
from fastadapt.gdpl.domain_encoder import DomainEncoder
from fastadapt.gdpl.model import GDPLModel
from fastadapt.gdpl.upstream import compare_clip, convert_gdpl_state_dict
from fastadapt.saved_adapter import Shapes, check_shapes

FORMAT = "fastadapt-gdpl"
FORMAT_VERSION = 2  # since 2 with a hash of the configuration


class GDPLSource(FrozenParts):
    """Name the frozen parts of a model, and make the model."""

    def create(
        self,
        class_names: Sequence[str],
        config: GDPLConfig | None = None,
        *,
        quick_gelu: bool | None = None,
    ) -> GDPLModel:
        """Make a new model.

        Args:
            class_names: one per output.
            config: the paper's settings if ``None``.
            quick_gelu: as for :func:`create_clip`.

        Raises:
            InputError: a name is unknown, or weights are unavailable.
        """
        clip, tokenizer = create_clip(self.clip, self.clip_weights, quick_gelu=quick_gelu)
        encoder: str | int | DomainEncoder = self.domain_encoder
        if isinstance(encoder, str):
            encoder = DomainEncoder(
                encoder,
                normalization=self.domain_normalization,
                weights=self.domain_weights,
                input_size=None if self.domain_size is None else (3, *(self.domain_size,) * 2),
            )
        return GDPLModel(clip, encoder, class_names, config, tokenizer=tokenizer)


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
        InputError: a tensor holds NaN or infinity, or the folder has a configuration of something
            else.
    """
    folder = Path(folder)
    check_own_folder(folder)
    state = trained_state(model)
    check_finite(state, "the model")
    write_tensors(folder / WEIGHTS, state)
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "source": None if source is None else asdict(source),
        "fingerprints": frozen or fingerprints(model),
        "feature_dim": model.prompt_learner.feature_dim,
        "gdpl": model.config.to_dict(),
        "class_names": list(model.class_names),
        "clip_activation": activation(model.clip),
        "weights_sha256": sha256_file(folder / WEIGHTS),
        **extra,
    }
    write_json(folder / CONFIG, seal(config))


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
        InputError: a file is missing, damaged or of a newer version; the two files are not of one
            save; the frozen weights, or the CLIP model's activation, are others; a tensor is
            missing, unexpected, not finite, or has another shape.
    """
    folder = Path(folder)
    config, state = read_checkpoint(folder, FORMAT, "GDPL model", FORMAT_VERSION)
    try:
        settings = GDPLConfig.from_dict(config["gdpl"], f"{folder / CONFIG}, gdpl")
        names = class_names or config["class_names"]
        source, recorded, width = config["source"], config["fingerprints"], config["feature_dim"]
    except KeyError as error:
        raise InputError(f"{folder / CONFIG} lacks the key {error}") from None
    if not isinstance(names, list | tuple) or not isinstance(recorded, dict):
        raise InputError(f"{folder / CONFIG}: class_names or fingerprints are damaged")
    check_shapes(_shapes(settings, width, state), state, folder / WEIGHTS)
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
        # Older versions took open_clip's activation, whatever the weights were trained with.
        model = source.create(
            names, settings, quick_gelu=None if "clip_activation" in config else False
        )
    else:
        encoder = width if domain_encoder is None else domain_encoder
        model = GDPLModel(clip, encoder, names, settings, tokenizer=tokenizer)
    for part, fingerprint in fingerprints(model).items():
        if fingerprint is not None and fingerprint != recorded.get(part):
            raise InputError(
                f"{folder} was trained with other weights of the {part.replace('_', ' ')} than "
                "these: give the ones that it was trained with"
            )
    computes = activation(model.clip)
    if config.get("clip_activation", computes) != computes:
        raise InputError(
            f"{folder} was trained on a CLIP model with {config['clip_activation']}; this one "
            f"computes {computes}: give the same model (open_clip's names end in -quickgelu)"
        )
    _load_trained(model, state, str(folder / WEIGHTS))
    check_weights_hash(folder, config)
    return model.eval()


def _shapes(settings: GDPLConfig, width: Any, state: dict[str, Tensor]) -> Shapes:
    """Return the shapes of the tensors that bound all sizes of the configuration."""
    if type(width) is not int or width < 1:
        raise InputError(f"feature_dim is {width!r}; expected at least 1")
    hidden = settings.hidden or max(width // 16, 1)
    shapes: Shapes = {
        "prompt_learner.ctx": (settings.n_ctx, None),
        "prompt_learner.deep_ctx": (settings.depth - 1, settings.n_ctx, None),
        "prompt_learner.meta_net.linear1.weight": (hidden, width),
    }
    if settings.rank:
        shapes["low_rank.vision.in_proj_A"] = (settings.rank_depth, settings.rank, None)
    return shapes


def load_upstream(model: GDPLModel, checkpoint: str | Path | dict[str, Any]) -> GDPLModel:
    """Load a checkpoint of the paper's code into a model, in place.

    Args:
        model: made with the checkpoint's settings, around the CLIP model and the domain encoder
            that it was trained with.
        checkpoint: a file that upstream's trainer wrote, or what it holds: a state dict of
            upstream's ``CustomCLIP``, alone or beside optimizer and scheduler.

    Raises:
        InputError: the file cannot be read; a part is missing or foreign, or has another shape
            than the model's (another depth, rank, context or domain encoder); the checkpoint's own
            CLIP weights are not the model's; the tensor is named.
    """
    where = "the checkpoint" if isinstance(checkpoint, dict) else str(checkpoint)
    if isinstance(checkpoint, dict):
        found = find_state_dict(checkpoint, where)
    else:
        found = read_foreign(checkpoint)
    state = convert_gdpl_state_dict(found.state)
    check_finite(state, where)
    _check_shapes_and_names(model, state, where)
    compare_clip(model.clip, found.state, where)
    _load_trained(model, state, where)
    return model


def _load_trained(model: GDPLModel, state: dict[str, Tensor], where: str) -> None:
    """Load exactly the trained tensors. Raises InputError naming the first that does not fit."""
    _check_shapes_and_names(model, state, where)
    model.load_state_dict(state, strict=False)


def _check_shapes_and_names(model: GDPLModel, state: dict[str, Tensor], where: str) -> None:
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
