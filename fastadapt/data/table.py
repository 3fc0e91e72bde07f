"""Read a CSV that lists image files with their labels and splits."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from fastadapt.data.splits import SPLIT_NAMES
from fastadapt.data.walker import LabeledFile
from fastadapt.errors import InputError, first_few


def list_table(file: Path, check_files: bool = True) -> list[LabeledFile]:
    """List the rows of a CSV with the columns path, label and, optionally, split.

    Args:
        file: its paths are absolute, or relative to its folder.
        check_files: whether the files must exist.

    Raises:
        InputError: the CSV cannot be read, lacks columns, files, labels or rows, names an unknown
            split, or gives a split for some rows only.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, skipinitialspace=True, strict=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            lines = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read as a CSV in UTF-8: {error}") from None
    for column in ("path", "label"):
        if column not in columns:
            raise InputError(
                f"{file} has no column {column!r}; its columns are {', '.join(columns) or 'none'}. "
                "Expected path, label and, optionally, split."
            )
    if not lines:
        raise InputError(f"{file} has no rows below its header")
    files, missing = [], []
    for number, row in lines:
        values = {c: (row.get(c) or "").strip() for c in ("path", "label", "split")}
        for column in ("path", "label"):
            if not values[column]:
                raise InputError(f"{file}, line {number}: the {column} is empty")
        split = values["split"].lower()
        if split and split not in SPLIT_NAMES:
            raise InputError(
                f"{file}, line {number}: unknown split {values['split']!r}; "
                "expected train, val or test"
            )
        path = Path(os.path.normpath(file.parent / values["path"]))
        if check_files and not path.is_file():
            missing.append(path)
        files.append(LabeledFile(path, values["label"], SPLIT_NAMES.get(split, "")))
    if missing:
        raise InputError(
            f"{file} lists {len(missing)} files that do not exist, of {len(files)}: "
            f"{first_few(missing)}. Paths are relative to the CSV's folder."
        )
    without = sum(not listed.split for listed in files)
    if 0 < without < len(files):
        raise InputError(
            f"{file} gives a split for {len(files) - without} of its {len(files)} rows: "
            "give one for every row, or for none"
        )
    return files
