"""Find the image files in folders, by one rule at every level, and keep account of the rest.

What is left out is counted by reason in a :class:`WalkReport`: hidden files and folders, folders
of systems (``@eaDir``, ``__MACOSX``), folders that this package wrote (runs, bundles), files that
are no images by their names, links that lead nowhere or back. Links to files and to folders are
followed.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastadapt.data.formats import is_image_file
from fastadapt.errors import InputError, form, printable
from fastadapt.files import read_lines, resolve_listed
from fastadapt.written_folders import is_ours

SYSTEM_FOLDERS = frozenset(
    ("__macosx", "@eadir", "__pycache__", "$recycle.bin", "system volume information", "lost+found")
)
LISTS = (".txt", ".lst")
DEAD_LINKS, NO_FILES = "links that lead nowhere", "pipes, sockets or devices"
UNREADABLE = "unreadable folders"
MANY_RUNS = 8  # of more, the first one and their number are named

PathLike = str | os.PathLike[str]


@dataclass
class WalkReport:
    """What a walk left out.

    Attributes:
        skipped: files and folders by reason: how many, and the first one.
        runs: folders of runs and bundles that were left out.
        notes: further lines, of a table's columns for one.
        own: says which files and folders are the command's own, and not worth a word.
    """

    skipped: dict[str, tuple[int, Path]] = field(default_factory=dict)
    runs: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    own: Callable[[Path], bool] = lambda path: False

    def skip(self, path: Path, reason: str) -> None:
        """Count a file or a folder that is left out."""
        if self.own(path):
            return
        count, first = self.skipped.get(reason, (0, path))
        self.skipped[reason] = (count + 1, first)

    def skip_run(self, folder: Path) -> None:
        """Note a folder of a run or a bundle that is left out."""
        if not self.own(folder):
            self.runs.append(folder)

    @property
    def unreadable_folders(self) -> int:
        """The number of folders that could not be entered, whose images nobody knows."""
        return sum(n for why, (n, _) in self.skipped.items() if why.startswith(UNREADABLE))

    def add(self, other: WalkReport) -> None:
        """Take in what another walk left out."""
        for reason, (count, first) in other.skipped.items():
            before, path = self.skipped.get(reason, (0, first))
            self.skipped[reason] = (before + count, path)
        self.runs += other.runs
        self.notes += other.notes

    def lines(self) -> list[str]:
        """Say in lines for the terminal what was left out; empty if nothing was."""
        lines = []
        if self.skipped:
            parts = [
                f"{count} {form(count, _of_one(reason), reason)} ({'first ' * (count > 1)}{first})"
                for reason, (count, first) in self.skipped.items()
            ]
            lines.append(f"left out: {'; '.join(parts)}")
        if len(self.runs) > MANY_RUNS:
            first = self.runs[0]
            lines.append(f"left out: {len(self.runs)} folders that fastadapt wrote (first {first})")
        else:
            lines += [f"left out: {path}, a folder that fastadapt wrote" for path in self.runs]
        return [printable(line) for line in (*lines, *self.notes)]


def walk(
    sources: PathLike | Iterable[PathLike], report: WalkReport | None = None
) -> Iterator[Path]:
    """Yield the image files of folders, files, lists of files and glob patterns, one by one.

    Args:
        sources: one or several. A folder is walked to its depth, sorted; a file is given whatever
            its name; a text file (``.txt``, ``.lst``) lists one path a line, relative to it; a
            pattern has ``*``, ``?`` or ``[``, and ``**`` for folders of any depth.
        report: where to count what is left out.

    Raises:
        InputError: a source does not exist, or a pattern matches nothing; when it is reached.
    """
    report = WalkReport() if report is None else report
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    for source in sources:
        path = Path(source)
        if path.is_dir():
            yield from walk_folder(path, report)
        elif path.suffix.lower() in LISTS and path.is_file():
            yield from _walk_list(path)
        elif path.is_file():
            yield path
        elif glob.has_magic(str(source)):
            yield from _walk_pattern(str(source), report)
        else:
            is_ = "is a pipe, a socket or a device" if path.exists() else "does not exist"
            raise InputError(
                f"{source} {is_}; expected a folder, an image file, a list of files "
                f"({', '.join(LISTS)}) or a pattern such as 'images/*.png'"
            )


def walk_folder(root: Path, report: WalkReport, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the image files below a folder, sorted: those in it, then those of its subfolders.

    Args:
        root: a folder, walked even if its own name is hidden.
        report: where to count what is left out.
        above: real paths of the folders that lead here, so that links don't go in circles.
    """
    files, folders = list_entries(root, report, above)
    yield from files
    for folder in folders:
        yield from walk_folder(folder, report, (*above, os.path.realpath(root)))


def list_entries(
    root: Path, report: WalkReport, above: tuple[str, ...] = ()
) -> tuple[list[Path], list[Path]]:
    """List the image files in a folder and the subfolders to enter, each sorted by name.

    This is the one rule for what is data; see the module's first lines.
    """
    files: list[Path] = []
    folders: list[Path] = []
    try:
        with os.scandir(root) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        report.skip(root, f"{UNREADABLE} ({error.strerror})")
        return files, folders
    for entry in entries:
        path = root / entry.name
        if entry.name.startswith("."):
            report.skip(path, "hidden")
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:  # links in a circle, or to where nobody may look
            report.skip(path, f"{DEAD_LINKS} ({error.strerror})")
            continue
        if is_folder:
            if entry.name.lower() in SYSTEM_FOLDERS:
                report.skip(path, "folders of a system")
            elif os.path.realpath(path) in (*above, os.path.realpath(root)):
                report.skip(path, "links that lead back")
            elif is_ours(path):
                report.skip_run(path)
            else:
                folders.append(path)
        elif is_file:
            if is_image_file(path):
                files.append(path)
            else:
                report.skip(path, _kind(path))
        else:
            report.skip(path, DEAD_LINKS if entry.is_symlink() else NO_FILES)
    return files, folders


def _of_one(reason: str) -> str:
    """Return why files are left out, of a single one: "links that lead back" become a link."""
    if reason == NO_FILES:
        return "pipe, socket or device"
    found = re.sub(r"\b(folder|link|image|file)s\b", r"\1", reason, count=1)
    return found.replace("that lead ", "that leads ")


def _kind(path: Path) -> str:
    """Name a file that is no image by its name."""
    return f"{path.suffix.lower()} files" if path.suffix else "files without a suffix"


def _walk_list(file: Path) -> Iterator[Path]:
    for line in read_lines(file):
        yield resolve_listed(file.parent, line)


def _walk_pattern(pattern: str, report: WalkReport) -> Iterator[Path]:
    found = False
    for name in sorted(glob.iglob(pattern, recursive=True)):  # noqa: PTH207 (may be absolute)
        path = Path(name)
        if path.is_dir():
            continue
        if not path.is_file():
            report.skip(path, NO_FILES if path.exists() else DEAD_LINKS)
        elif is_image_file(path):
            found = True
            yield path
        else:
            report.skip(path, _kind(path))
    if not found:
        raise InputError(f"{pattern} matches no image file")
