"""Make open_clip models by name, with the activation that their weights were trained with."""

from __future__ import annotations

import zipfile
from pathlib import Path

from torch import nn

from fastadapt.errors import InputError, nearest
from fastadapt.gdpl.class_tree import Tokenizer


def create_clip(
    name: str, weights: str | None = None, *, quick_gelu: bool | None = None
) -> tuple[nn.Module, Tokenizer]:
    """Make an open_clip model and its tokenizer.

    OpenAI's weights were trained with QuickGELU. ``ViT-B-16`` with the weights ``openai`` computes
    GELU in open_clip, silently; here it gets the activation of its weights.

    Args:
        name: open_clip's (``ViT-B-16``, ``hf-hub:…`` or ``local-dir:…``).
        weights: open_clip's tag, or a local file.
        quick_gelu: compute QuickGELU whatever the name says, or only if it says so; the activation
            that the weights are known to have been trained with if ``None``.

    Raises:
        InputError: open_clip is not installed, does not know the name or the weights, or cannot
            load them; the name asks for QuickGELU and the weights were trained without.
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
        if quick_gelu is None:
            quick_gelu = trained_with_quick_gelu(name, weights)
    elif weights is not None:
        raise InputError(f"{name} brings its own weights; leave out `clip_weights`")
    try:
        clip = open_clip.create_model(
            name,
            pretrained=weights,
            require_pretrained=True,
            force_quick_gelu=bool(quick_gelu),
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the CLIP model {name} cannot be loaded: {reason}") from error
    return clip, tokenizer


def trained_with_quick_gelu(name: str, weights: str) -> bool | None:
    """Tell whether weights were trained with QuickGELU; ``None`` if that is not known.

    Args:
        name: open_clip's, of the model that gets them.
        weights: open_clip's tag, or a local file. A TorchScript archive is OpenAI's own.

    Raises:
        InputError: they were trained with GELU, and the name asks for QuickGELU.
    """
    import open_clip

    wanted = bool((open_clip.get_model_config(name) or {}).get("quick_gelu"))
    if weights not in open_clip.list_pretrained_tags_by_model(name):
        return True if _is_torchscript(weights) else None
    stated = open_clip.get_pretrained_cfg(name, weights) or {}
    quick = bool(stated.get("quick_gelu"))
    if wanted and not quick:
        raise InputError(
            f"{name} computes QuickGELU, and the weights {weights} were trained with GELU: give "
            f"{name.removesuffix('-quickgelu')}"
        )
    return quick


def _is_torchscript(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.partition("/")[2].startswith("code/") for name in archive.namelist())
