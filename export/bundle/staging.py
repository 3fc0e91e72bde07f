"""Folders that are either whole or not there: made beside their target, renamed when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from fastadapt.errors import InputError
from fastadapt.files import exchange, read_json
from fastadapt.locks import in_use, is_in_use

from .manifest import FORMAT, MANIFEST, SIGNATURE
from .measured import MEASURED, is_measured

OURS = "fastadapt-"  # in the names of temporary folders
NOT_OURS_TO_KEEP = frozenset((".DS_Store", "Thumbs.db", "desktop.ini"))  # systems write them


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse, before any work, a target that must not be replaced, with an InputError.

    It may be replaced if it is empty, or a bundle with nothing in it that its manifest does not
    list.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    manifest = _manifest(target)
    if manifest is None:
        raise InputError(f"{target} exists and is no bundle: choose another `out`")
    if not overwrite:
        raise InputError(
            f"{target} exists: replace it with `overwrite=True`, or choose another `out`"
        )
    files = manifest.get("files")
    ours = {MANIFEST, SIGNATURE, *(files if isinstance(files, dict) else ())}
    if is_measured(target / MEASURED):
        ours.add(MEASURED)
    check_nothing_else(target, ours)


def check_nothing_else(folder: Path, ours: Container[str]) -> None:
    """Refuse to replace a folder that holds files beside those that were written here.

    Args:
        folder: that is to be replaced.
        ours: the files that may go, relative to it.

    Raises:
        InputError: there are others; it names the first.
    """
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_dir() and not file.is_symlink():
            continue
        if name not in ours and file.name not in NOT_OURS_TO_KEEP and not _is_temporary(file, ours):
            raise InputError(
                f"{folder} holds {name}, which no export wrote there: move it away, or choose "
                "another `out`"
            )


def _is_temporary(file: Path, ours: Container[str]) -> bool:
    """Say whether a kill left the file while it was written in place, by ``verify --rebuild``."""
    found = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}\.tmp", file.name)
    return found is not None and found[1] in ours


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return a bundle's manifest, whole or not; None if the folder is no bundle."""
    try:
        manifest = read_json(folder / MANIFEST)
    except InputError:
        return None
    return manifest if manifest.get("format") == FORMAT else None


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out``; it is removed afterwards unless it was renamed.

    Folders that exports of the same name left there when they were killed are removed first.

    Raises:
        InputError: the disk is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with in_use(out.parent):
            _remove_leftovers(out)
            prefix = f".{out.name}.{OURS}"
            folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=prefix, suffix=".tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            stack.enter_context(in_use(folder))  # so that others can tell
        try:
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)
            yield folder
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"no space left on the disk of {out.parent.absolute()}: free some and export "
                "again. Nothing was written."
            ) from error


def place(folder: Path, target: Path) -> None:
    """Give a complete folder its target's name; an old target is removed afterwards.

    Old and new exchange their names in one step where the system can (Linux, on most file systems).
    Elsewhere the old one is renamed first; after a kill between the two steps the next export to
    this target puts it back.
    """
    if not target.exists():
        folder.rename(target)
        return
    if exchange(folder, target):
        shutil.rmtree(folder)
        return
    with in_use(target.parent):
        old = folder.with_name(f"{folder.name}.old")
        target.rename(old)
        try:
            folder.rename(target)
        except BaseException:
            old.rename(target)
            raise
    shutil.rmtree(old)


def _remove_leftovers(out: Path) -> None:
    """Remove what killed exports of the same name left; put back a bundle they were replacing."""
    ours = re.compile(rf"\.{re.escape(out.name)}\.{OURS}[a-z0-9_]{{8}}\.tmp")
    old = re.compile(rf"\.{re.escape(out.name)}\.({OURS})?[a-z0-9_]{{8}}\.tmp\.old")
    for folder in sorted(out.parent.glob(".*.tmp*")):
        if folder.is_symlink() or not folder.is_dir():
            continue
        if ours.fullmatch(folder.name) and not is_in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)
        elif old.fullmatch(folder.name) and not is_in_use(folder):
            manifest = _manifest(folder)
            if manifest is not None and not out.exists() and manifest.get("accepted"):
                folder.rename(out)
            elif manifest is not None:
                shutil.rmtree(folder, ignore_errors=True)
