"""Finished parts of the results, kept beside the file until all are there: ``FILE.parts``.

A part holds the rows of a fixed number of images. Its ``.json`` is written last and makes it count:
hash of its paths and labels, files that cannot be read, and how many predictions were right. So a
command that was killed goes on with the first part without one, and the joined file is the same as
if it had not been killed. ``manifest.json`` holds what the rows depend on; other settings, another
model or another list of images are refused. Once the parts are joined, ``FILE.job.json`` holds the
same, so that results which are complete are told from those of another model as well.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastadapt.errors import InputError
from fastadapt.files import atomic_path, is_temporary, read_json, sha256_file, write_json
from fastadapt.locks import lock_of

from .formats import Format
from .sources import Item

MANIFEST = "manifest.json"  # by which the walker tells that the folder is ours
KIND, VERSION = "fastadapt-parts", 2
JOB = "fastadapt-results"  # format of the file that tells how results were made
KEPT = "finished parts are kept, go on with `resume=True`"
_NAME = re.compile(r"part-[0-9]{6,}\.(json|jsonl|csv|parquet)|manifest\.json")


@dataclass
class Part:
    """What is known of a part beside its rows.

    Attributes:
        images: that it covers.
        digest: of their paths and labels.
        unreadable: path and reason of each that cannot be read.
        confusion: how often a known class (number) got a predicted one, by the pair.
        dropped: what of files is not read, pages after the first for one: how many, and the first.
    """

    images: int = 0
    digest: str = ""
    unreadable: list[list[str]] = field(default_factory=list)
    confusion: Counter[tuple[int, int]] = field(default_factory=Counter)
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)

    def drop(self, what: str, path: str, count: int = 1) -> None:
        """Count files of which something is not read; ``path`` is the first of them."""
        before, first = self.dropped.get(what, (0, path))
        self.dropped[what] = (before + count, first)

    def to_dict(self) -> dict[str, Any]:
        """Return the part's ``.json``."""
        pairs = [[*pair, count] for pair, count in sorted(self.confusion.items())]
        return {**vars(self), "confusion": pairs}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Part:
        """Read the part's ``.json``."""
        pairs = Counter({(known, guess): n for known, guess, n in values["confusion"]})
        dropped = {what: (n, first) for what, (n, first) in values.get("dropped", {}).items()}
        return cls(values["images"], values["digest"], values["unreadable"], pairs, dropped)


class Parts:
    """The folder of the parts of one file.

    Args:
        file: the results.
    """

    def __init__(self, file: Path):
        self.file = file
        self.folder = file.with_name(f"{file.name}.parts")
        self.unreadable_file = file.with_name(f"{file.name}.unreadable.csv")
        self.job_file = file.with_name(f"{file.name}.job.json")
        self._written = frozenset((file.name, self.unreadable_file.name, self.job_file.name))
        self._own = self._written | {self.folder.name, lock_of(file).name}

    def own(self, path: Path) -> bool:
        """Say whether a file or folder is one that this job writes, by its name and folder."""
        if path.name not in self._own and not is_temporary(path.name, self._written):
            return False
        return path.parent.resolve() == self.file.parent.resolve()

    def made_by(self) -> dict[str, Any] | None:
        """Return what :meth:`join` noted of the results that are complete.

        Returns:
            What they depend on; ``None`` if nothing is noted, or of another file than is there.

        Raises:
            InputError: the note is damaged, or not this command's.
        """
        self._check_own()
        if not self.job_file.is_file():
            return None
        found = read_json(self.job_file)
        return found if found.get("sha256") == sha256_file(self.file) else None

    @property
    def complete(self) -> bool:
        """Whether the results are there, and no part waits to be joined."""
        return self.file.is_file() and not (self.folder / MANIFEST).is_file()

    def begin(self, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> set[int]:
        """Make the folder, or take the one that is there.

        Args:
            identity: what the rows depend on.
            resume: keep finished parts.
            overwrite: remove what is there.

        Returns:
            The numbers of the parts that are finished.

        Raises:
            InputError: results are there; or parts of other settings.
        """
        manifest = self.folder / MANIFEST
        self._check_own()
        finished = {int(record.stem[5:]) - 1 for record in self.folder.glob("part-*.json")}
        nothing = not finished and not resume and not self.file.exists()  # that could be lost
        if overwrite or nothing or not manifest.is_file():  # made or removed by halves, else
            self.remove()
            finished = set()
        elif not resume:
            raise InputError(
                f"{self.folder} holds finished parts of an earlier command: go on from them with "
                "`resume=True`, or start again with `overwrite=True`"
            )
        if self.file.exists() and not (overwrite or self.folder.exists()):
            raise InputError(
                f"{self.file} is there, and complete: replace it with `overwrite=True`"
            )
        identity = json.loads(json.dumps(identity))
        if manifest.is_file():
            self._check_same(read_json(manifest), identity)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(manifest, {"format": KIND, "version": VERSION, **identity})
        return finished

    def _check_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        if before.get("format") != KIND or before.get("version") != VERSION:
            raise InputError(
                f"{self.folder} was not written by this version: start again with `overwrite=True`"
            )
        if said := difference(before, now):
            raise InputError(
                f"{self.folder} was made with another {said}: give the same, or start again with "
                "`overwrite=True`"
            )

    def read(self, number: int) -> Part:
        """Read what is known of a finished part."""
        return Part.from_dict(read_json(self._record(number)))

    def check_images(self, number: int, items: Sequence[Item]) -> None:
        """Refuse images that are not those of a finished part.

        Raises:
            InputError: the list of images has changed.
        """
        if digest_of(items) != self.read(number).digest:
            raise InputError(
                f"the images are not those of {self.folder} (part {number + 1}): name the same, or "
                "start again with `overwrite=True`"
            )

    def finish(self, number: int, part: Part, rows: Format) -> None:
        """Write a part to disk."""
        with atomic_path(self._rows(number)) as temporary:
            rows.write_part(temporary)
        write_json(self._record(number), part.to_dict())

    def join(self, count: int, rows: Format, made_by: dict[str, Any]) -> None:
        """Write the results, the list of unreadable files and how they were made; remove the parts.

        Args:
            count: of parts.
            rows: their format.
            made_by: what the results depend on.
        """
        unreadable = (row for n in range(count) for row in self.read(n).unreadable)
        first = next(unreadable, None)
        if first is None:
            self.unreadable_file.unlink(missing_ok=True)
        else:
            with (
                atomic_path(self.unreadable_file) as temporary,
                temporary.open(
                    "w", encoding="utf-8", errors="backslashreplace", newline=""
                ) as file,
            ):
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows([("path", "reason"), first])
                writer.writerows(unreadable)
        self.job_file.unlink(missing_ok=True)  # it is of results that are replaced now
        with atomic_path(self.file) as temporary:
            rows.join((self._rows(n) for n in range(count)), temporary)
        note = {"format": JOB, "version": 1, "sha256": sha256_file(self.file), **made_by}
        write_json(self.job_file, note)
        self.remove()

    def remove(self) -> None:
        """Remove the folder, its manifest first, so that no half counts, and temporary files.

        Raises:
            InputError: it holds files of others.
        """
        for path in self.file.parent.glob(".*.tmp"):  # of a command that was killed
            if is_temporary(path.name, self._written):
                path.unlink(missing_ok=True)
        if not self.folder.exists():
            return
        self._check_own()
        (self.folder / MANIFEST).unlink(missing_ok=True)
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()

    def _check_own(self) -> None:
        """Refuse to go on where a file or folder of ours would stand lies something else.

        Raises:
            InputError: naming it.
        """
        manifest, named = self.folder / MANIFEST, "move it away, or give another `out`"
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise InputError(f"{self.folder} is no folder of parts: {named}")
        if manifest.is_file() and read_json(manifest).get("format") != KIND:
            raise InputError(f"{self.folder} holds {MANIFEST} of something else: {named}")
        for file in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            known = _NAME.fullmatch(file.name) or is_temporary(file.name, _NAME)
            if not known or not file.is_file():
                raise InputError(
                    f"{self.folder} holds {file.name}, which this command did not write: {named}"
                )
        unreadable = self.unreadable_file
        if unreadable.exists() and not _begins_with(unreadable, b"path,reason\n"):
            raise InputError(f"{unreadable} was not written by this command: {named}")
        job = self.job_file
        if job.exists() and not (job.is_file() and read_json(job).get("format") == JOB):
            raise InputError(f"{job} was not written by this command: {named}")

    def _rows(self, number: int) -> Path:
        return self.folder / f"part-{number + 1:06}{self.file.suffix.lower()}"

    def _record(self, number: int) -> Path:
        return self.folder / f"part-{number + 1:06}.json"


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the first value that differs from what was noted; empty if all are the same."""
    for key, value in now.items():
        there = before.get(key)
        if there == value:
            continue
        if isinstance(there, dict) and isinstance(value, dict) and there.keys() == value.keys():
            one = next(name for name in value if there[name] != value[name])
            return f"{key} ({one} {_short(there[one])}, now {_short(value[one])})"
        return f"{key} ({_short(there)}, now {_short(value)})"
    return ""


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(_short(each) for each in next(iter(value.items()), ()))
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"


def _begins_with(file: Path, content: bytes) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(content)) == content


def digest_of(items: Sequence[Item]) -> str:
    """Hash paths and labels of images, in order."""
    text = "".join(f"{path}\0{label}\n" for path, label in items)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
