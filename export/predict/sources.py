"""Find the images to predict, one by one: folders, patterns, tables and lists of any length."""

from __future__ import annotations

import codecs
import csv
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from fastadapt.data.table import SEPARATORS
from fastadapt.data.walker import LISTS, WalkReport, walk
from fastadapt.errors import InputError, counted, first_few
from fastadapt.files import open_text, resolve_listed

from .settings import FOLDERS

TABLES = (".csv", ".tsv")
STDIN = "-"
PATH = "path"


class Item(NamedTuple):
    """An image to predict.

    Attributes:
        path: of the file.
        label: the name of its class, if it is known; else empty.
    """

    path: str
    label: str = ""


@dataclass
class ImageList:
    """The images of all sources, in order.

    Attributes:
        sources: as :class:`fastadapt.export.predict.settings.WorkSettings` says.
        labels: a column of the tables, ``"folders"``, or ``None`` for no labels.
        classes: of the model; needed for labels from folders.
        report: what was left out.
    """

    sources: Sequence[str]
    labels: str | None = None
    classes: tuple[str, ...] = ()
    report: WalkReport = field(default_factory=WalkReport)
    _unknown: Unknown = field(init=False)

    def __post_init__(self) -> None:
        self._unknown = Unknown(self.labels == FOLDERS)

    def check(self) -> None:
        """Refuse sources that are not there, before any work.

        Raises:
            InputError: one does not exist, matches nothing, or lacks a column; or labels are asked
                for that no source has.
        """
        column = self.labels not in (None, FOLDERS)
        for source in self.sources:
            if _is_table(source):
                with open_text(source) as file:
                    _Table(source, file, self.labels if column else None)
            elif column:
                raise InputError(
                    f"the labels are the column {self.labels!r}, and {source} is no table "
                    f"({', '.join(TABLES)}): give a table, or --labels {FOLDERS}"
                )
            elif source != STDIN and not Path(source).is_file() and not Path(source).is_dir():
                next(walk(source), None)

    def check_labels(self) -> None:
        """Refuse labels that are no class of the model, before any work; not of standard input.

        Raises:
            InputError: naming the first, how many there are, and the classes.
        """
        if self.labels is None:
            return
        found, total = Unknown(self.labels == FOLDERS), 0
        for source in self.sources:
            for item in () if source == STDIN else self._of(source, WalkReport()):
                self._labelled(item, found)
                total += 1
        if found.count:
            remedy = (
                "name other folders, or take labels from a column of a CSV, --labels COLUMN"
                if self.labels == FOLDERS
                else "correct them, or leave a cell empty where the class is not known"
            )
            raise InputError(
                f"{found.said(total)}; its classes are {first_few(self.classes, 8)}: {remedy}"
            )

    def lines(self) -> list[str]:
        """Say in lines for the terminal what was left out; empty if nothing was."""
        lines = self.report.lines()
        if self._unknown.count:
            lines.append(f"{self._unknown.said()}: left out of the metrics")
        return lines

    @property
    def countable(self) -> bool:
        """Whether the images can be counted beforehand: standard input is read once."""
        return STDIN not in self.sources

    def count(self) -> int:
        """Count the images; it takes a walk through all folders."""
        return sum(1 for source in self.sources for _ in self._of(source, WalkReport()))

    def __iter__(self) -> Iterator[Item]:
        for source in self.sources:
            for item in self._of(source, self.report):
                yield item if self.labels is None else self._labelled(item, self._unknown)

    def digest(self) -> ListDigest:
        """Walk all images, and hash them as :class:`ListDigest` does."""
        found = ListDigest(self.labels)
        for source in self.sources:
            for item in self._of(source, WalkReport()):
                found.add(item)
        return found

    def _of(self, source: str, report: WalkReport) -> Iterator[Item]:
        if source == STDIN:
            # Not as text: names of files need not be any.
            for number, line in enumerate(sys.stdin.buffer):
                name = os.fsdecode(line if number else line.removeprefix(codecs.BOM_UTF8))
                if name.strip():
                    yield Item(_listed(Path(), name))
        elif _is_table(source):
            with open_text(source) as file:
                column = None if self.labels == FOLDERS else self.labels
                yield from _Table(source, file, column)
        elif source.lower().endswith(LISTS) and Path(source).is_file():
            folder = Path(source).parent
            with open_text(source) as file:
                for line in file:
                    if line.strip():
                        yield Item(_below(folder, _listed(folder, line)))
        else:
            for path in walk(source, report):
                yield Item(str(path))

    def _labelled(self, item: Item, unknown: Unknown) -> Item:
        """Return an image with its label, or without one if that is no class, which is counted."""
        if self.labels == FOLDERS:
            for name in reversed(Path(item.path).parent.parts):  # the nearest one
                if name in self.classes:
                    return Item(item.path, name)
            unknown.add(item.path)
        elif item.label and item.label not in self.classes:
            unknown.add(f"{item.label!r} of {item.path}")
        else:
            return item
        return Item(item.path)


@dataclass
class Unknown:
    """Labels that are no class of the model.

    Attributes:
        of_folders: they are names of folders, else values of a column.
        count: of images that have them.
        first: what says which the first one is.
    """

    of_folders: bool
    count: int = 0
    first: str = ""

    def add(self, label: str) -> None:
        """Count one."""
        self.first, self.count = self.first or label, self.count + 1

    def said(self, total: int | None = None) -> str:
        """Say in a sentence how many there are of a total."""
        many, one = self.count if total is None else total, self.count == 1
        number = f"{self.count}" if total is None else f"{self.count} of {total}"
        if self.of_folders:
            images, lie = "image" if many == 1 else "images", "lies" if one else "lie"
            what = f"{images} {lie} in no folder that has the name of a class of the model"
        else:
            labels, are = "label" if many == 1 else "labels", "is" if one else "are"
            what = f"{labels} {are} no class of the model"
        return f"{number} {what}, {self.first} for one"


class ListDigest:
    """A hash of images: their number, paths, and labels that stand in a column.

    Args:
        labels: as of :class:`ImageList`; labels from folders say nothing that paths do not.
    """

    def __init__(self, labels: str | None):
        self.count, self._labels = 0, labels not in (None, FOLDERS)
        self._hash = hashlib.sha256()

    def add(self, item: Item) -> None:
        """Add the next image."""
        text = f"{item.path}\0{item.label if self._labels else ''}\n"
        self._hash.update(text.encode("utf-8", "surrogateescape"))
        self.count += 1

    def to_dict(self) -> dict[str, Any]:
        """Return number and hash."""
        return {"count": self.count, "sha256": self._hash.hexdigest()}


def _below(folder: Path, path: str) -> str:
    """Return a path of a list or table, which are relative to its folder, Windows' ones too."""
    return str(resolve_listed(folder, path) if "\\" in path else folder / path)


def _listed(folder: Path, line: str) -> str:
    """Return the path in a line of a list, with the spaces around it where its file has them."""
    name = line.rstrip("\r\n")
    path = name.strip()
    return name if name != path and os.path.lexists(folder / name) else path


def _is_table(source: str) -> bool:
    return source.lower().endswith(TABLES) and Path(source).is_file()


class _Table:
    """The rows of a table with a column path, read as they are asked for."""

    def __init__(self, name: str, file: IO[str], label: str | None):
        self.name, self.folder = name, Path(name).parent
        header = file.readline()
        self.skipped = 0
        if header.lower().startswith("sep="):  # how Excel notes the separator
            header, self.skipped = file.readline(), 1
        lines: Iterable[str] = itertools.chain([header], file)
        separator = max(SEPARATORS, key=lambda s: (PATH in _names(header, s), header.count(s)))
        self.rows = csv.reader(
            lines, delimiter=separator, skipinitialspace=separator != "\t", strict=True
        )
        names = self._next_row() or []
        columns = [column.strip() for column in names]
        self.columns = len(columns)
        lowered = [column.lower() for column in columns]
        self.path = self._place(PATH, lowered, columns)
        self.label = None if label is None else self._place(label.lower(), lowered, columns)

    def _place(self, name: str, lowered: list[str], columns: list[str]) -> int:
        if name not in lowered:
            known = ", ".join(filter(None, columns)) or "none"
            raise InputError(f"{self.name} has no column {name!r}; its columns are {known}")
        return lowered.index(name)

    def _next_row(self) -> list[str] | None:
        try:
            return next(self.rows, None)
        except csv.Error as error:
            line = self.skipped + self.rows.line_num
            raise InputError(f"{self.name}, line {line} is no row of a CSV: {error}") from None

    def __iter__(self) -> Iterator[Item]:
        while (row := self._next_row()) is not None:
            if not any(cell.strip() for cell in row):
                continue
            if any(cell.strip() for cell in row[self.columns :]):
                line = self.skipped + self.rows.line_num
                raise InputError(
                    f"{self.name}, line {line} has {counted(len(row), 'value')} for "
                    f"{counted(self.columns, 'column')}: "
                    "put values that hold a separator into quotation marks"
                )
            path = row[self.path].strip() if self.path < len(row) else ""
            if not path:
                line = self.skipped + self.rows.line_num
                raise InputError(f"{self.name}, line {line}: the path is empty")
            known = self.label is not None and self.label < len(row)
            label = row[self.label].strip() if known and self.label is not None else ""
            yield Item(_below(self.folder, path), label)


def _names(header: str, separator: str) -> set[str]:
    return {cell.strip().strip('"').lower() for cell in header.split(separator)}
