"""Read a table that lists image files with their labels and splits, whatever program wrote it."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import NamedTuple

from fastadapt.data.class_folders import LabeledFile
from fastadapt.data.splits import split_of
from fastadapt.data.walker import WalkReport
from fastadapt.errors import InputError, counted, first_few, form
from fastadapt.files import read_text, resolve_listed

COLUMNS = ("path", "label", "split", "group", "fold")
NO_VALUES = ("nan", "<na>", "nat")  # what programs write where there is no value
SEPARATORS = ",;\t|"


class Table(NamedTuple):
    """What a table holds.

    Attributes:
        rows: line number and values by column, stripped; ``""`` where there is no value.
        unused: names of further columns.
    """

    rows: list[tuple[int, dict[str, str]]]
    unused: list[str]

    def note(self) -> str:
        """Say in a line for the terminal which columns are not used; empty if all are."""
        if not self.unused:
            return ""
        grouped = any(values["group"] for _, values in self.rows)
        hint = " (a column group keeps images of one patient or place in one split)"
        return f"columns that are not used: {first_few(self.unused, 5)}{'' if grouped else hint}"


def list_table(
    file: Path, check_files: bool = True, report: WalkReport | None = None
) -> list[LabeledFile]:
    """List the rows of a table with the columns path, label and, optionally, split, group, fold.

    Args:
        file: separated by commas, semicolons or tabs, in any encoding of
            :func:`fastadapt.files.read_text`; its paths are absolute, or relative to its folder.
        check_files: whether the files must exist.
        report: where to note columns that are not used.

    Raises:
        InputError: the table cannot be read, lacks columns, files, labels or rows, has a row of
            more values than columns, a label that is no value (NaN), names an unknown split, or
            gives a split or a group for some rows only.
    """
    files, missing = [], []
    table = read_table(file)
    if report is not None and (note := table.note()):
        report.notes.append(note)
    for number, values in table.rows:
        for column in ("path", "label"):
            if not values[column]:
                raise InputError(f"{file}, line {number}: the {column} is empty")
        for column in ("label", "group", "fold"):
            if values[column].casefold() in NO_VALUES:
                raise InputError(
                    f"{file}, line {number}: the {column} is {values[column]}, which is no value: "
                    "give one, or leave the row out"
                )
        split = split_of(values["split"])
        if values["split"] and not split:
            raise InputError(
                f"{file}, line {number}: unknown split {values['split']!r}; "
                "expected train, val or test"
            )
        path = resolve_listed(file.parent, values["path"])
        if check_files and not os.path.isfile(path):  # noqa: PTH113 (a name may be too long)
            missing.append(path)
        more = values["group"], values["fold"]
        files.append(LabeledFile(path, values["label"], split, *more))
    if missing:
        raise InputError(
            f"{file} lists {counted(len(missing), 'file')} that "
            f"{form(len(missing), 'does', 'do')} not exist, of {len(files)}: "
            f"{first_few(missing)}. Paths are relative to the CSV's folder."
        )
    for column in ("split", "group"):
        without = sum(not getattr(listed, column) for listed in files)
        if 0 < without < len(files):
            raise InputError(
                f"{file} gives a {column} for {len(files) - without} of its "
                f"{counted(len(files), 'row')}: "
                "give one for every row, or for none"
            )
    if all(split_of(listed.label) for listed in files):
        raise InputError(
            f"{file} has splits in its column 'label' ({files[0].label!r}): name that column "
            "'split', and give classes in 'label'"
        )
    return files


def read_table(file: Path) -> Table:
    """Read the columns of :data:`COLUMNS` of every row that is not empty.

    Raises:
        InputError: as :func:`list_table`, as far as no row's meaning is concerned.
    """
    lines = read_text(file).split("\n")
    start = 0
    if lines[0].strip().lower().startswith("sep="):  # how Excel notes the separator
        start = 1
    header = lines[start] if len(lines) > start else ""
    separator = max(SEPARATORS, key=lambda s: (_has_columns(header, s), header.count(s)))
    reader = csv.reader(
        (f"{line}\n" for line in lines[start:]),
        delimiter=separator,
        skipinitialspace=separator != "\t",
        strict=True,
    )
    try:
        rows = [(start + reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{file} cannot be read as a CSV in UTF-8: {error}") from None
    names = [name.strip().lower() for name in rows[0][1]] if rows else []
    for column in ("path", "label"):
        if column not in names:
            known = ", ".join(name.strip() for name in rows[0][1]) if names else ""
            raise InputError(
                f"{file} has no column {column!r}; its columns are {known or 'none'}. Expected "
                "path, label and, optionally, split, group and fold (text in UTF-8, separated by "
                "commas)."
            )
        if names.count(column) > 1:
            raise InputError(f"{file} has the column {column!r} {names.count(column)} times")
    table = []
    for number, row in rows[1:]:
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if any(cells[len(names) :]):
            raise InputError(
                f"{file}, line {number} has {counted(len(cells), 'value')} for "
                f"{counted(len(names), 'column')}: put "
                "values that hold a separator into quotation marks"
            )
        found = dict(zip(names, cells, strict=False))
        table.append((number, {column: found.get(column, "") for column in COLUMNS}))
    if not table:
        raise InputError(f"{file} has no rows below its header")
    return Table(table, [name for name in names if name and name not in COLUMNS])


def _has_columns(header: str, separator: str) -> bool:
    cells = {cell.strip().strip('"').lower() for cell in header.split(separator)}
    return {"path", "label"} <= cells
