"""Write results as CSV, JSON lines or Parquet: in parts, which are then joined to one file.

Joined parts are the file that one writer would have written, byte for byte, whichever of them an
earlier command wrote.
"""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastadapt.errors import InputError

from .columns import Column, Values


class Format(ABC):
    """A format of files; rows are collected until a part of them is written.

    Args:
        columns: of the rows.
    """

    def __init__(self, columns: Sequence[Column]):
        self.columns = columns

    @abstractmethod
    def add(self, values: Values) -> None:
        """Add rows to the part that is being made."""

    @abstractmethod
    def write_part(self, file: Path) -> None:
        """Write the part, and begin the next."""

    @abstractmethod
    def join(self, parts: Iterable[Path], file: Path) -> None:
        """Write all parts, in order, as one file."""


class CsvFormat(Format):
    """A header, and a row for each image; a column of several values becomes several columns."""

    def __init__(self, columns: Sequence[Column]):
        super().__init__(columns)
        self._begin()

    def _begin(self) -> None:
        self._text = io.StringIO()

    def add(self, values: Values) -> None:
        """Add rows to the part that is being made."""
        cells: list[list[str]] = []
        for column, found in zip(self.columns, values, strict=True):
            if isinstance(found, list):
                cells.append(_cells(found))
            elif column.numbers:
                # One pattern for a row is three times as fast as a number at a time.
                pattern = ",".join(["%.7g"] * found.shape[1])
                cells.append([pattern % tuple(row) for row in found.tolist()])
            else:
                cells += [_cells(entry) for entry in found.T.tolist()]
        self._text.writelines(f"{','.join(row)}\n" for row in zip(*cells, strict=True))

    def write_part(self, file: Path) -> None:
        """Write the rows, without the header."""
        file.write_text(_writable(self._text.getvalue()), encoding="utf-8", newline="")
        self._begin()

    def join(self, parts: Iterable[Path], file: Path) -> None:
        """Write the header and all rows."""
        names: list[str] = []
        for column in self.columns:
            names += [f"{column.name}_{entry}" for entry in column.entries] or [column.name]
        header = io.StringIO()
        csv.writer(header, lineterminator="\n").writerow(names)
        _concatenate(header.getvalue(), parts, file)


def _cells(values: Iterable[Any]) -> list[str]:
    """Return values as a row of CSV holds them, in quotes where they need them."""
    rows: list[str] = []
    csv.writer(_Lines(rows.append), lineterminator="\n").writerows((value, 0) for value in values)
    return [row.removesuffix(",0\n") for row in rows]


class _Lines(NamedTuple):
    """What csv.writer writes to, one row a call."""

    write: Callable[[str], object]


class JsonLinesFormat(Format):
    """A JSON object a line for each image."""

    def __init__(self, columns: Sequence[Column]):
        super().__init__(columns)
        self._lines: list[str] = []

    def add(self, values: Values) -> None:
        """Add rows to the part that is being made."""
        plain: list[list[Any]] = []
        for column, found in zip(self.columns, values, strict=True):
            if isinstance(found, list):
                plain.append([_writable(text) for text in found])
                continue
            rows = found.tolist()
            if column.numbers:
                rows = [[_number(x) for x in row] for row in rows]
            if column.keyed:
                rows = [dict(zip(column.entries, row, strict=True)) for row in rows]
            plain.append(rows)
        names = [column.name for column in self.columns]
        for row in zip(*plain, strict=True):
            fields = dict(zip(names, row, strict=True))
            self._lines.append(json.dumps(fields, ensure_ascii=False) + "\n")

    def write_part(self, file: Path) -> None:
        """Write the rows."""
        file.write_text("".join(self._lines), encoding="utf-8", newline="")
        self._lines = []

    def join(self, parts: Iterable[Path], file: Path) -> None:
        """Write all rows."""
        _concatenate("", parts, file)


class ParquetFormat(Format):
    """A Parquet table with a row group for each part; several values are a list of fixed size."""

    def __init__(self, columns: Sequence[Column]):
        super().__init__(columns)
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise InputError(
                "Parquet files need pyarrow: pip install pyarrow, or write .csv or .jsonl"
            ) from None
        self._arrow: Any = pyarrow
        entries = {c.name: list(c.entries) for c in columns if c.keyed}
        metadata = {f"fastadapt.{name}": json.dumps(names) for name, names in entries.items()}
        fields = [(column.name, self._type(column)) for column in columns]
        self._schema = pyarrow.schema(fields, metadata=metadata)
        self._tables: list[Any] = []

    def _type(self, column: Column) -> Any:
        kind = self._arrow.float32() if column.numbers else self._arrow.string()
        return self._arrow.list_(kind, len(column.entries)) if column.entries else kind

    def add(self, values: Values) -> None:
        """Add rows to the part that is being made."""
        arrays = []
        for column, found in zip(self.columns, values, strict=True):
            if isinstance(found, list):
                arrays.append(self._arrow.array(map(_writable, found), self._arrow.string()))
                continue
            kind = self._arrow.float32() if column.numbers else self._arrow.string()
            flat = self._arrow.array(np.ascontiguousarray(found).reshape(-1), kind)
            width = len(column.entries)
            arrays.append(self._arrow.FixedSizeListArray.from_arrays(flat, width))
        self._tables.append(self._arrow.Table.from_arrays(arrays, schema=self._schema))

    def write_part(self, file: Path) -> None:
        """Write the rows as a table."""
        tables = self._tables or [self._schema.empty_table()]
        table = self._arrow.concat_tables(tables).combine_chunks()
        self._arrow.parquet.write_table(table, file)
        self._tables = []

    def join(self, parts: Iterable[Path], file: Path) -> None:
        """Write all rows as one table."""
        parquet = self._arrow.parquet
        with parquet.ParquetWriter(file, self._schema) as writer:
            for part in parts:
                table = parquet.read_table(part, schema=self._schema)
                if table.num_rows:
                    writer.write_table(table)


FORMATS: dict[str, type[Format]] = {
    ".csv": CsvFormat,
    ".jsonl": JsonLinesFormat,
    ".ndjson": JsonLinesFormat,
    ".parquet": ParquetFormat,
}


def check_ending(file: Path) -> None:
    """Refuse a file whose ending names no format.

    Raises:
        InputError: as said.
    """
    if file.suffix.lower() not in FORMATS:
        raise InputError(f"{file} has the ending {file.suffix!r}; expected {', '.join(FORMATS)}")


def _number(value: float) -> float | None:
    """Return the number with as many digits as fp32 holds; JSON has no NaN and no infinity."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _writable(text: str) -> str:
    """Write the bytes of a file's name that are no UTF-8 as they are in Python's strings."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _concatenate(header: str, parts: Iterable[Path], file: Path) -> None:
    with file.open("wb") as target:
        target.write(header.encode("utf-8"))
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target, 2**20)
