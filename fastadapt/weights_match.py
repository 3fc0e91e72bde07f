"""Whether a state dict is of the model that it is meant for, and if not, of which.

A tensor that the model does not know is as wrong as one that is missing: a ResNet-34 file holds
all of ResNet-18's tensors. Only constants that other versions of timm save are left out, and, where
the caller allows it, a classifier.
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError, counted, first_few
from fastadapt.files import check_finite

# Constants and counters that some versions of timm and torch save and others do not.
DERIVED = re.compile(
    r"(^|\.)(num_batches_tracked|relative_position_index|relative_coords_table|attn_mask"
    r"|position_ids)$"
)
SUGGESTION_SECONDS = 10.0


@dataclass(frozen=True)
class Match:
    """How a state dict differs from a model's.

    Attributes:
        missing: names that the state dict lacks.
        unexpected: names that the model does not have.
        shapes: names whose shapes differ.
        classifier: those of ``unexpected`` that look like a classifier.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[str, ...]
    classifier: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every tensor has its place, but for a classifier that is left over."""
        return not (self.missing or self.shapes or set(self.unexpected) - set(self.classifier))


def match_weights(model: nn.Module, state: dict[str, Tensor]) -> Match:
    """Compare a state dict with a model's names and shapes."""
    own = model.state_dict()
    unexpected = tuple(n for n in state if n not in own and not DERIVED.search(n))
    return Match(
        missing=tuple(n for n in own if n not in state and not DERIVED.search(n)),
        unexpected=unexpected,
        shapes=tuple(n for n in own if n in state and state[n].shape != own[n].shape),
        classifier=tuple(classifier_names(model, {n: state[n] for n in unexpected})),
    )


def classifier_names(model: Any, unexpected: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors, all unknown to a model, that look like a classifier's.

    They are below the name that timm gives the model's classifier, or below a name that the model
    does not have at all, where the last matrix takes the model's features.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    stated = config.get("classifier") or ()
    stated = (stated,) if isinstance(stated, str) else tuple(stated)
    own = {name.partition(".")[0] for name in model.state_dict()}
    widths = {getattr(model, name, None) for name in ("num_features", "head_hidden_size")}
    parts: dict[str, list[str]] = {}
    for name in unexpected:
        part = next((s for s in stated if name.startswith(f"{s}.")), name.partition(".")[0])
        parts.setdefault(part, []).append(name)
    found = []
    for part, names in parts.items():
        matrices = [unexpected[n] for n in names if n.endswith("weight") and unexpected[n].ndim > 1]
        takes_features = any(matrix.shape[1] in widths for matrix in matrices)
        if part in stated or (part not in own and takes_features):
            found += names
    return found


def load_weights(
    model: nn.Module, state: dict[str, Tensor], source: str, *, name: str = "", head: bool = True
) -> None:
    """Load a state dict, if it is of this model.

    Args:
        model: to load into.
        state: names, without wrappers' prefixes, to tensors.
        source: names the file in messages.
        name: timm's name of the model, to suggest others by.
        head: a classifier that the model does not have is an error, too.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape, or not finite; tensors and,
            if one is found, timm's model of these names and shapes are named.
    """
    match = match_weights(model, state)
    if not match.fits:
        raise InputError(f"{source}: {describe(match, model, state, name)}")
    if head and match.classifier:
        raise InputError(
            f"{source}: {first_few(match.classifier)} look like a classifier, and are not where "
            f"{name or 'the model'} has its own: rename them, or leave them out with "
            "`features=True`"
        )
    own = model.state_dict()
    state = {key: state.get(key, own[key]) for key in own}
    check_finite(state, source)
    model.load_state_dict(state)


def pooling_options(state: dict[str, Tensor]) -> dict[str, Any]:
    """Return timm's options for a ViT that was trained on averaged tokens, else none.

    Such a model normalises the average (``fc_norm``), not the tokens (``norm``).
    """
    averaged = "fc_norm.weight" in state and "norm.weight" not in state
    return {"global_pool": "avg"} if averaged else {}


def describe(match: Match, model: nn.Module, state: dict[str, Tensor], name: str) -> str:
    """Say in one line how a state dict differs from a model's, and of which model it is."""
    own, said = model.state_dict(), []
    if match.missing:
        said.append(f"lacks {counted(len(match.missing), 'tensor')} ({first_few(match.missing)})")
    foreign = [n for n in match.unexpected if n not in match.classifier]
    if foreign:
        said.append(f"holds {len(foreign)} that it does not have ({first_few(foreign)})")
    if match.shapes:
        first = match.shapes[0]
        said.append(
            f"{first} has shape {tuple(state[first].shape)}, expected {tuple(own[first].shape)}"
        )
    unnamed = [n for n in match.classifier if not n.startswith(_stated_classifier(model) or "?")]
    if unnamed:
        said.append(f"{first_few(unnamed)} look like a classifier")
    text = f"these are not the weights of {name or type(model).__name__}: {'; '.join(said)}"
    if not match.missing and not match.shapes:
        return f"{text}{_suggest(name, state)}"
    holds = f". It holds, for example, {next(iter(state), 'nothing')!r}"
    return f"{text}{_suggest(name, state) or holds}"


def _suggest(name: str, state: dict[str, Tensor]) -> str:
    found = suggest_timm_model(name, state) if name else None
    return f". Names and shapes are those of timm's {found}" if found else ""


def suggest_timm_model(
    name: str, state: dict[str, Tensor], seconds: float = SUGGESTION_SECONDS
) -> str | None:
    """Find the timm model whose names and shapes a state dict has, whatever its classifier.

    Relatives of ``name`` are tried, the ones of similar names first, without weights in memory.

    Args:
        name: timm's name of the model that the state dict does not fit.
        state: names to tensors.
        seconds: of this thread's computing, after which the search ends; waiting for a busy
            machine does not count, so that it finds the same there.
    """
    end = time.thread_time() + seconds
    for other in _relatives(name):
        if time.thread_time() > end:
            return None
        model = meta_model(other)
        if model is None:
            continue
        match = match_weights(model, state)
        classifier = _stated_classifier(model)
        shapes = [n for n in match.shapes if not n.startswith(classifier)]
        missing = [n for n in match.missing if not n.startswith(classifier)]
        if not shapes and not missing and set(match.unexpected) <= set(match.classifier):
            return other
    return None


def meta_model(name: str, **options: Any) -> Any:
    """Make a timm model whose tensors have shapes and no memory; ``None`` if timm cannot."""
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options)
    except Exception:  # models that compute with their weights when they are made
        return None


def _stated_classifier(model: Any) -> tuple[str, ...]:
    stated = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    stated = (stated,) if isinstance(stated, str) else tuple(stated)
    return tuple(f"{part}." for part in stated)


def _relatives(name: str) -> Iterator[str]:
    import timm

    architecture = name.partition(".")[0]
    try:
        module = timm.models.model_entrypoint(architecture).__module__.rpartition(".")[2]
    except (RuntimeError, KeyError):
        return
    others = [other for other in timm.list_models(module=module) if other != architecture]

    def similarity(other: str) -> float:
        return difflib.SequenceMatcher(None, architecture, other).ratio()

    yield from sorted(others, key=similarity, reverse=True)
