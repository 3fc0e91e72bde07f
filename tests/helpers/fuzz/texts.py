"""Tables and lists: what is read must be what Python's ``csv`` reads of the same text."""

from __future__ import annotations

import codecs
import csv
import io
import os
import random
from pathlib import Path

from fastadapt.data.table import SEPARATORS, list_table
from fastadapt.export.predict.sources import ImageList
from fastadapt.files import read_lines
from tests.helpers.fuzz.mutations import mutate_bytes, mutate_text
from tests.helpers.fuzz.target import ACCEPTED, Target

ROWS = [
    ("path", "label", "split"),
    ("a/1.png", "crack", "train"),
    ("a/2.png", "good", "train"),
    ("b,c/3 4.png", "Über;maß", "val"),
    ('d"e.png', "crack", "test"),
    ("f.png", "a|b", "train"),
]
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "utf-32")
LINE_ENDS = ("\n", "\r\n", "\r")
PIECES = (",", ";", "\t", "|", '"', '""', "'", "\n", "\r\n", "\r", "\n\n", "path", "label", "split")
PIECES += (
    "PATH",
    "train",
    "test",
    "x.png",
    "../",
    "/",
    "\\",
    "C:\\a\\b.png",
    "sep=;\n",
    "=1+1",
    "#",
)
PIECES += ("a" * 300,)


def sound_table(choose: random.Random) -> str:
    """Write the rows as a spreadsheet may."""
    file = io.StringIO()
    rows = [row[: choose.choice((2, 3, 3))] for row in ROWS] if choose.random() < 0.1 else ROWS
    if choose.random() < 0.2:
        rows = [(*row, "more") for row in rows]
    writer = csv.writer(
        file,
        delimiter=choose.choice(SEPARATORS),
        quoting=choose.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
        lineterminator=choose.choice(LINE_ENDS),
    )
    writer.writerows(rows)
    note = f"sep={SEPARATORS[0]}\n" if choose.random() < 0.05 else ""
    return note + file.getvalue()


def encoded(choose: random.Random, text: str) -> bytes:
    """Encode a text as some program may."""
    data = text.encode(choose.choice(ENCODINGS), "replace")
    return mutate_bytes(choose, data) if choose.random() < 0.4 else data


def decoded(data: bytes) -> list[str]:
    """Return all texts that the bytes may be; an oracle must find what was read among them."""
    names = ["utf-8-sig", "cp1252", "utf-16-le", "utf-16-be"]
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        names = ["utf-32"]
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        names = ["utf-16"]
    found = []
    for name in names:
        try:
            found.append(data.decode(name))
        except UnicodeDecodeError:
            continue
    return found


class Tables(Target):
    """Tables of a data set: path, label and split."""

    def check(self, choose: random.Random, scratch: Path) -> str:
        """Read a damaged table; compare its rows."""
        text = sound_table(choose)
        if choose.random() < 0.8:
            text = mutate_text(choose, text, PIECES)
        data, path = encoded(choose, text), scratch / "table.csv"
        path.write_bytes(data)
        listed = list_table(path, check_files=choose.random() < 0.2)
        found = [(_absolute(path.parent, str(row.path)), row.label) for row in listed]
        tried = []
        for text in decoded(data):
            for rows in _by_csv(text):
                wanted = _columns(rows, path.parent)
                if found == wanted:
                    return ACCEPTED
                tried.append(wanted)
        return f"rows {found[:4]!r}, csv reads {tried[:2]!r}"[:600]


def _by_csv(text: str) -> list[list[list[str]]]:
    """Read a text with every separator, as ``csv`` does."""
    first, _, rest = text.partition("\n")
    text = rest if first.strip().lower().startswith("sep=") else text
    found = []
    for separator in SEPARATORS:
        for skip in (True, False):
            reader = csv.reader(
                io.StringIO(text, newline=""),
                delimiter=separator,
                skipinitialspace=skip,
                strict=True,
            )
            try:
                found.append(list(reader))
            except csv.Error:
                continue
    return found


def _columns(rows: list[list[str]], folder: Path) -> list[tuple[str, str]] | None:
    """Return paths and labels, where the header has both."""
    if not rows:
        return None
    names = [name.strip().lower() for name in rows[0]]
    if "path" not in names or "label" not in names:
        return None
    path, label = names.index("path"), names.index("label")
    found = []
    for row in rows[1:]:
        if not any(cell.strip() for cell in row):
            continue
        if path >= len(row) or any(cell.strip() for cell in row[len(names) :]):
            return None
        row = [*row, *[""] * len(names)]
        # Line ends inside of quotes are ours to choose.
        cells = [cell.replace("\r\n", "\n").replace("\r", "\n").strip() for cell in row]
        found.append((_absolute(folder, cells[path]), cells[label]))
    return found


def _absolute(folder: Path, path: str) -> str:
    """Return a path as it is looked for: Windows' separators may be meant."""
    return os.path.normpath(folder / path.replace("\\", "/"))


class Lists(Target):
    """Lists of class names, one a line, and of images."""

    def check(self, choose: random.Random, scratch: Path) -> str:
        """Read a damaged list; compare its lines."""
        names = ["crack", "good", "Über maß", "a,b", "c;d", '"quoted"', "漢字", "x.png"]
        text = choose.choice(LINE_ENDS).join(names)
        text = mutate_text(choose, text, PIECES)
        data, path = encoded(choose, text), scratch / "names.txt"
        path.write_bytes(data)
        if choose.random() < 0.5:
            found = read_lines(path)
        else:
            sources = ImageList([str(path)])
            sources.check()
            found = [item.path for item in sources]
        by_path = [_absolute(scratch, line) for line in found]
        for text in decoded(data):
            lines = io.StringIO(text, newline=None).read().split("\n")
            wanted = [line.strip() for line in lines if line.strip()]
            if found == wanted or by_path == [_absolute(scratch, line) for line in wanted]:
                return ACCEPTED
        if codecs.BOM_UTF8.startswith(data):
            return ACCEPTED  # nothing but the beginning of a byte order mark
        return f"lines {found!r} of {data[:200]!r}"


class Listings(Target):
    """Tables of images to predict, with or without labels."""

    def check(self, choose: random.Random, scratch: Path) -> str:
        """Read a damaged table; compare its rows."""
        text = sound_table(choose)
        if choose.random() < 0.8:
            text = mutate_text(choose, text, PIECES)
        data, path = encoded(choose, text), scratch / "table.csv"
        path.write_bytes(data)
        classes = ("crack", "good", "Über;maß", "a|b")
        sources = ImageList([str(path)], choose.choice((None, "label")), classes)
        sources.check()
        sources.check_labels()
        rows = list(sources)
        labelled = sources.labels is not None
        tried = []
        for text in decoded(data):
            for read in _by_csv(text):
                wanted = _columns(read, path.parent) if labelled else _paths(read, path.parent)
                if wanted is None:
                    continue
                found = [(str(scratch / row.path), row.label) for row in rows]
                normal = [(_absolute(scratch, path), label) for path, label in found]
                if normal == wanted:
                    return ACCEPTED
                tried.append(wanted)
        return f"rows {rows[:4]!r}, csv reads {tried[:2]!r}"[:600]


def _paths(rows: list[list[str]], folder: Path) -> list[tuple[str, str]] | None:
    names = [name.strip().lower() for name in rows[0]] if rows else []
    if "path" not in names:
        return None
    column = names.index("path")
    kept = [row for row in rows[1:] if any(cell.strip() for cell in row)]
    if any(column >= len(row) or any(map(str.strip, row[len(names) :])) for row in kept):
        return None
    clean = (row[column].replace("\r\n", "\n").replace("\r", "\n").strip() for row in kept)
    return [(_absolute(folder, path), "") for path in clean]
