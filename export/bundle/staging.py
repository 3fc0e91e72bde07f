"""Folders that are either whole or not there: made beside their target, renamed when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastadapt.errors import InputError
from fastadapt.files import read_json

from .manifest import FORMAT, MANIFEST

try:
    import fcntl
except ImportError:  # Windows: the user removes what a killed export leaves
    fcntl = None  # type: ignore[assignment]


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse, before any work, a target that must not be replaced, with an InputError."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    is_bundle = (target / MANIFEST).is_file() and (
        read_json(target / MANIFEST).get("format") == FORMAT
    )
    if not is_bundle:
        raise InputError(f"{target} exists and is no bundle: choose another `out`")
    if not overwrite:
        raise InputError(
            f"{target} exists: replace it with `overwrite=True`, or choose another `out`"
        )


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``out``; it is removed afterwards unless it was renamed.

    Folders that exports of the same name left there when they were killed are removed first.

    Raises:
        InputError: the disk is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _locked(out.parent):
            _remove_leftovers(out)
            folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            # Held while this process lives, so that others can tell that the folder is in use.
            stack.enter_context(_locked(folder))
        try:
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)
            yield folder
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise InputError(
                f"no space left on the disk of {out.parent.absolute()}: free some and export "
                "again. Nothing was written."
            ) from error


def place(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``; an old target is removed once the new one is in place."""
    with _locked(target.parent):
        if not target.exists():
            folder.rename(target)
            return
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
    ours = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}\.tmp(\.old)?")
    for folder in sorted(out.parent.glob(".*.tmp*")):
        if not ours.fullmatch(folder.name) or not folder.is_dir() or _in_use(folder):
            continue
        if folder.suffix == ".old" and not out.exists() and _is_accepted(folder):
            folder.rename(out)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_accepted(folder: Path) -> bool:
    try:
        return bool(read_json(folder / MANIFEST).get("accepted"))
    except InputError:
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process; do nothing where there are no locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network's file system may have none
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _in_use(folder: Path) -> bool:
    """Tell whether a running export holds the folder; true where that cannot be told."""
    if fcntl is None:
        return True
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
