"""State dicts of checkpoint files, whichever trainer wrote them, without running their code.

1. The file is read: safetensors, or what ``torch.save`` wrote (:mod:`fastadapt.inert_pickle`).
2. Every dictionary of names to tensors in it is a candidate (``state_dict``, ``model``, ``net``,
   an EMA beside the raw weights). One is taken, by :data:`PREFERRED` or as the user says.
3. Prefixes of wrappers are removed: ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile),
   ``model.`` (Lightning), and so on.
"""

from __future__ import annotations

import os
import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt import inert_pickle
from fastadapt.errors import InputError, first_line
from fastadapt.files import read_tensors

# Where a file holds several state dicts, the first of these is taken: an EMA before the raw
# weights, as timm does.
PREFERRED = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "params_ema",
    "",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
PREFIXES = ("module.", "model.", "net.", "network.", "ema_model.")
# torch.compile, FSDP and checkpointing wrap parts of a model, too.
INNER = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
CHUNK = 2**24
DEPTH = 3  # of dictionaries in dictionaries
MOST_ITEMS = 1_000_000  # of dictionaries that are looked into
LEAST_LIMIT = 2**26  # bytes of tensors that any file may claim
MOST_SHARED = 4  # times a file's size that its tensors may have: weights are tied, views expanded


@dataclass(frozen=True)
class Checkpoint:
    """A state dict that was read from a file.

    Attributes:
        state: names, without wrappers' prefixes, to tensors.
        key: where it is in the file; empty for the file itself.
        candidates: the keys of all state dicts in the file.
        prefix: the prefix that was removed from every name.
    """

    state: dict[str, Tensor]
    key: str = ""
    candidates: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def choice(self) -> str:
        """Which of several candidates was taken, in words; empty if there was one only."""
        if len(self.candidates) < 2:
            return ""
        others = ", ".join(key or "the file itself" for key in self.candidates if key != self.key)
        return f"{self.key!r} was taken, not {others}; `checkpoint_key=...` takes another"


def read_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Read a state dict from a .safetensors, .pth, .pt, .ckpt, .tar or .bin file.

    Args:
        path: of the file.
        key: which state dict is meant, ``"state_dict_ema"`` for one, where there are several; a
            part that follows the name (``"state_dict.ema_model"``) is a prefix of its names.

    Raises:
        InputError: the file is missing or damaged, holds no state dict, or several of which none
            is preferred; the candidates are named.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return find_state_dict(read_tensors(path)[0], str(path), key)
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected a file of weights")
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    found = find_state_dict(_unpickle(path), str(path), key)
    claimed = sum(t.numel() * t.element_size() for t in found.state.values())
    if claimed > max(LEAST_LIMIT, MOST_SHARED * path.stat().st_size):
        raise InputError(
            f"{path} cannot be read as weights alone: its tensors claim {claimed:,} bytes, far "
            "more than it holds"
        )
    return found


def read_state_dict(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """Read a state dict as :func:`read_checkpoint` does, and warn where there were several."""
    found = read_checkpoint(path, key)
    if found.choice and key is None:
        warnings.warn(f"{path} holds several state dicts: {found.choice}", stacklevel=2)
    return found.state


def find_state_dict(value: Any, where: str, key: str | None = None) -> Checkpoint:
    """Find the state dict in what a file held.

    Args:
        value: a state dict, or dictionaries that hold some.
        where: names the file in messages.
        key: as for :func:`read_checkpoint`.

    Raises:
        InputError: as for :func:`read_checkpoint`.
    """
    found = dict(_candidates(value, (), count()))
    if not found:
        raise InputError(f"{where} cannot be read as weights alone: {_why_none(value)}")
    names = tuple(found)
    if key is not None:
        return _named(found, key, where)
    rank = {name: _rank(name) for name in names}
    best = [name for name in names if rank[name] == min(rank.values())]
    if len(best) > 1:
        raise InputError(
            f"{where} holds several state dicts, {', '.join(map(repr, best))}: name one with "
            "`checkpoint_key=...`"
        )
    state, prefix = strip_wrappers(found[best[0]])
    return Checkpoint(state, best[0], names, prefix)


def strip_wrappers(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Remove wrappers' prefixes from names; return the state dict and the common prefix removed."""
    state = {INNER.sub("", name): tensor for name, tensor in state.items()}
    averaged = {name for name in state if name == "n_averaged"}  # of torch's AveragedModel
    if averaged and all(n.startswith("module.") for n in state.keys() - averaged):
        state = {name: tensor for name, tensor in state.items() if name not in averaged}
    removed = ""
    while state:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        removed += prefix
    return state, removed


def _candidates(
    value: Any, path: tuple[str, ...], visits: Iterator[int], seen: frozenset[int] = frozenset()
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the state dicts inside a value, by the path to them.

    Args:
        value: what a file held.
        path: to it.
        visits: counts the items, since a file can name a dictionary a billion times.
        seen: those that hold this one.
    """
    if not isinstance(value, dict) or isinstance(value, inert_pickle.Inert) or id(value) in seen:
        return
    if value and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        yield ".".join(path), dict(value)
        return
    if len(path) < DEPTH:
        for key, part in value.items():
            if next(visits) >= MOST_ITEMS:
                raise InputError(
                    f"the checkpoint holds more than {MOST_ITEMS:,} items of dictionaries in "
                    "dictionaries: save model.state_dict() and give that"
                )
            if isinstance(key, str) and key not in ("optimizer", "optimizer_states"):
                yield from _candidates(part, (*path, key), visits, seen | {id(value)})


def _rank(name: str) -> int:
    first = name.partition(".")[0]
    return PREFERRED.index(first) if first in PREFERRED else len(PREFERRED)


def _named(found: dict[str, dict[str, Tensor]], key: str, where: str) -> Checkpoint:
    for name, state in found.items():
        prefix = key.removeprefix(name).strip(".")
        if key != name and not key.startswith(f"{name}." if name else ""):
            continue
        part = {
            n.removeprefix(f"{prefix}."): tensor
            for n, tensor in state.items()
            if not prefix or n.startswith(f"{prefix}.")
        }
        if part:
            part, removed = strip_wrappers(part)
            return Checkpoint(part, key, tuple(found), removed)
    names = ", ".join(repr(name) if name else "the file itself" for name in found)
    raise InputError(f"{where} has no state dict {key!r}; it has {names}")


def _why_none(value: Any) -> str:
    save = "save model.state_dict() and give that"
    origins = sorted(set(_origins(value, DEPTH)))
    if origins:
        return (
            f"it holds no state dict (names to tensors), but {', '.join(origins[:3])}, which could "
            f"run code and is not rebuilt: {save}"
        )
    return f"it holds no state dict (names to tensors): {save}"


def _origins(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, inert_pickle.Inert) or (
        isinstance(value, type) and issubclass(value, inert_pickle.Inert)
    ):
        yield value.origin
    elif depth and isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _origins(part, depth - 1)


def _unpickle(path: Path) -> Any:
    try:
        _check_container(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # more than tensors: what else it holds becomes inert
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a pickled module's source cannot be compared
                return torch.load(
                    path, map_location="cpu", weights_only=False, pickle_module=inert_pickle
                )
    except InputError:
        raise
    except Exception as error:  # damaged files raise almost anything
        reason = re.sub(r"\x1b\[[0-9;]*m", "", first_line(error))
        if not any(letter.isalpha() for letter in reason):  # a number that pickle does not know
            reason = "it is no file of torch.save"
        raise InputError(
            f"{path} cannot be read as weights alone ({reason}). Files of torch.save and "
            "safetensors are; any other pickle could run code: save model.state_dict() and give "
            "that."
        ) from None


def _is_damaged(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    """Say whether a member is not what its checksum says, which torch does not look at."""
    if member.compress_type != zipfile.ZIP_STORED or member.CRC == 0:
        return False  # torch.save can leave checksums out, as 0
    try:
        with archive.open(member) as file:
            while file.read(CHUNK):
                pass
    except zipfile.BadZipFile:
        return True
    return False


def _check_container(path: Path) -> None:
    """Refuse archives that are no checkpoint's, before torch looks into them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            damaged = [m.filename for m in members if _is_damaged(archive, m)]
        if any(m.filename.endswith("/constants.pkl") for m in members):
            raise InputError(
                f"{path} cannot be read as weights alone: it is a TorchScript program, which could "
                "run code: save model.state_dict() and give that"
            )
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise InputError(f"{path} is a compressed archive; expected a file of torch.save")
        if damaged:
            raise InputError(
                f"{path} is damaged: {damaged[0]} is not what its checksum says. Copy it again."
            )
    elif tarfile.is_tarfile(path):
        raise InputError(
            f"{path} is a tar archive, not a file of torch.save (whose name may end in .tar, too)"
        )
