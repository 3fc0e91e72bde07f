"""Decide, before any work, whether a command can write where ``out`` says.

1. A link to something is followed, once; one that leads nowhere is refused.
2. A folder that is written into (a run) may be any folder, a mount point and ``.`` too. One that is
   replaced as a whole (a bundle) is no mount point, nor a folder with the command's own working
   folder in it, unless that is empty. A file is replaced as a whole, too.
3. Nothing is written into a bundle, whose files are hashed, and no file over one of a run's own.
4. Names that file systems refuse, files where folders are expected and the other way round, and
   places that cannot be written are refused.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Literal

from fastadapt.errors import InputError
from fastadapt.written_folders import RUN_FILES, is_bundle, is_ours

Kind = Literal["folder", "replaced folder", "file"]
LONGEST = 200  # bytes of a name: temporary ones beside it are longer


def check_output(
    path: str | os.PathLike[str], kind: Kind, what: str = "an output", option: str = "out"
) -> Path:
    """Return where an output goes, with a link followed; see the module's first lines.

    Args:
        path: as the user gave it.
        kind: whether a folder is written into, or a folder or a file replaced as a whole.
        what: what it is to be, for messages: "a run".
        option: that the user gave it with.

    Raises:
        InputError: it cannot go there.
    """
    try:
        place = _checked(Path(path), kind, what, option)
        _check_written_folders(place, kind, option)
        _check_writable(place, kind != "folder", option)
        return place
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # links in a circle are a RuntimeError
        said = error.strerror if isinstance(error, OSError) else str(error)
        shown = str(path).replace("\0", "\\0")
        shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
        raise InputError(f"{shown} cannot be written: {said}. Choose another `{option}`") from None


def _checked(path: Path, kind: Kind, what: str, option: str) -> Path:
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise InputError(f"{place} is a link that leads nowhere: choose another `{option}`")
    if path.is_symlink():
        path = path.resolve()
    if kind != "folder" and path.name in ("", ".."):
        path = path.resolve()  # the name is needed for what is made beside it
    if not path.absolute().name or path.resolve() == Path(path.resolve().anchor):
        raise InputError(f"{path} cannot be {what}: choose the name of a folder as `{option}`")
    if len(os.fsencode(path.name)) > LONGEST:
        raise InputError(
            f"the name of {str(path)[:60]}… is too long: choose another `{option}`, of at most "
            f"{LONGEST} bytes"
        )
    exists = path.exists()
    if exists and kind == "file":
        if path.is_dir():
            raise InputError(f"{path} is a folder; expected a file")
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is no ordinary file: choose another `{option}`")
    elif exists and not path.is_dir():
        raise InputError(f"{path} is a file; expected a folder")
    if exists and kind != "folder":
        _check_replaceable(path, what, option)
    return path


def _check_written_folders(path: Path, kind: Kind, option: str) -> None:
    whole = path.resolve()
    for folder in (whole, *whole.parents) if kind == "folder" else whole.parents:
        if is_bundle(folder):
            where = "is a bundle" if folder == whole else f"is in the bundle {folder}"
            raise InputError(
                f"{path} {where}, which is whole only with the files that it was exported with: "
                f"choose a place outside of it as `{option}`"
            )
    if kind == "file" and whole.name in RUN_FILES and is_ours(whole.parent):
        raise InputError(
            f"{path} is the name of a file of the run in that folder: choose another `{option}`"
        )


def _check_replaceable(path: Path, what: str, option: str) -> None:
    whole = path.resolve()
    if str(whole) in mount_points() or os.path.ismount(whole):
        raise InputError(
            f"{path} is a mount point, which cannot be replaced by {what}: choose a name in it as "
            f"`{option}`"
        )
    here = Path.cwd()
    if whole in (here, *here.parents) and any(whole.iterdir()):
        raise InputError(
            f"{path} holds the folder that this command runs in, and cannot be replaced by {what}: "
            f"choose another `{option}`, or run it elsewhere"
        )


def _check_writable(path: Path, replaced: bool, option: str) -> None:
    """Make a file without a name where the first file or folder will be made."""
    there = path.absolute().parent if replaced else path.absolute()
    folder = next(p for p in (there, *there.parents) if p.exists())
    if not folder.is_dir():
        raise InputError(
            f"{folder} is a file, so that nothing can be in it: choose another `{option}`"
        )
    for place in {folder, path} if path.is_dir() else {folder}:
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise InputError(
                f"{path} cannot be written: {place}: {error.strerror}. Choose another `{option}`"
            ) from None


def mount_points() -> frozenset[str]:
    """Return the system's mount points, as far as it tells: Linux does."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    fields = (line.split(" ") for line in lines)
    return frozenset(_unescaped(row[4]) for row in fields if len(row) > 4)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
