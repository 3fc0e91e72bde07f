"""Data sets of labelled image files: read, checked and split."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastadapt.data.preprocess import is_image_file, load_image
from fastadapt.errors import InputError
from fastadapt.files import write_text
from fastadapt.progress import prefetch

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LAYOUTS = "class folders, train/ and val/ with class folders in them, or a CSV with path and label"


@dataclass(frozen=True)
class Sample:
    """One image file.

    Attributes:
        path: absolute.
        label: index into the data set's classes.
        split: ``"train"``, ``"val"`` or ``"test"``.
    """

    path: Path
    label: int
    split: str


@dataclass(frozen=True)
class Dataset:
    """Labelled image files with their splits.

    Attributes:
        classes: names, sorted.
        samples: sorted by path.
    """

    classes: tuple[str, ...]
    samples: tuple[Sample, ...]

    def split(self, *names: str) -> list[Sample]:
        """The samples of these splits."""
        return [sample for sample in self.samples if sample.split in names]

    def without(self, paths: Iterable[Path]) -> Dataset:
        """The data set less some files. Raises InputError if a class loses its last ones."""
        dropped = set(paths)
        kept = tuple(sample for sample in self.samples if sample.path not in dropped)
        _check_classes(self.classes, kept)
        return replace(self, samples=kept)

    def csv(self) -> str:
        """``path,label,split``, one sample a line; readable by :func:`read_dataset`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("path", "label", "split"))
        writer.writerows((s.path, self.classes[s.label], s.split) for s in self.samples)
        return text.getvalue()

    def write_splits(self, path: str | os.PathLike) -> None:
        """Writes :meth:`csv`, with absolute paths, whole or not at all."""
        write_text(path, self.csv())

    def fingerprint(self) -> str:
        """A hash of paths, labels and splits."""
        return hashlib.sha256(self.csv().encode()).hexdigest()


def read_dataset(
    data: str | os.PathLike, val_fraction: float = 0.2, seed: int = 0, *, check_files: bool = True
) -> Dataset:
    """Finds labelled images and splits them.

    Args:
        data: a folder of class folders; a folder with ``train/``, ``val/`` and ``test/`` of such
            folders; or a CSV with columns ``path`` (relative to the CSV, or absolute), ``label``
            and optionally ``split``. Without a val split, one is drawn from train.
        val_fraction: share of each class that is drawn for validation, where val is not given.
        seed: of that draw, which is stratified by class.
        check_files: whether a CSV's files must exist.

    Returns:
        The data set; every class is in train, and in val if that was drawn here.

    Raises:
        InputError: nothing there, fewer than two classes, a class that cannot be split, a CSV
            that lacks columns, files or labels, an unknown split, a file that is listed twice.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}; expected more than 0, less than 1")
    root = Path(data).absolute()
    if root.is_dir():
        rows = _rows_of_folder(root)
    elif root.is_file():
        rows = _rows_of_csv(root, check_files)
    else:
        raise InputError(f"{data} does not exist; DATA is {LAYOUTS}")

    counts = Counter(path for path, _, _ in rows)
    if len(counts) < len(rows):
        twice = next(path for path, count in counts.items() if count > 1)
        splits = sorted({split or "no split" for path, _, split in rows if path == twice})
        raise InputError(
            f"{data} lists {len(rows) - len(counts)} files more than once, {twice} first "
            f"({', '.join(splits)}): list each file once"
        )
    classes = tuple(sorted({label for _, label, _ in rows}))
    if len(classes) < 2:
        raise InputError(f"{data} has one class only, {classes[0]!r}; expected at least two")
    index = {name: i for i, name in enumerate(classes)}
    samples = [Sample(path, index[label], split or "train") for path, label, split in sorted(rows)]
    _check_classes(classes, samples, needs_val=False)
    if not any(sample.split == "val" for sample in samples):
        samples = _draw_val(classes, samples, val_fraction, seed)
    return Dataset(classes, tuple(samples))


def find_unreadable(
    dataset: Dataset, workers: int, on_image: Callable[[], None] | None = None
) -> list[tuple[Path, str]]:
    """Decodes every image once; the files that cannot be, and why.

    Args:
        workers: threads that decode.
        on_image: called after every image, for a progress bar.
    """

    def problem(sample: Sample) -> tuple[Path, str] | None:
        try:
            load_image(sample.path)
        except InputError as error:
            return sample.path, str(error)
        return None

    found = []
    for result in prefetch(problem, dataset.samples, workers, ahead=4 * workers):
        if result:
            found.append(result)
        if on_image:
            on_image()
    return found


def _rows_of_folder(root: Path) -> list[tuple[Path, str, str]]:
    """(path, label, split or "") of class folders, with or without split folders around them."""
    folders = _subfolders(root)
    if not any(folder.name == "train" and _subfolders(folder) for folder in folders):
        return _rows_of_classes(root, "")
    for folder in folders:
        if folder.name not in SPLIT_NAMES:
            raise InputError(
                f"{folder} stands beside train/, but is no split: expected train, val or test"
            )
    return [row for folder in folders for row in _rows_of_classes(folder, SPLIT_NAMES[folder.name])]


def _rows_of_classes(root: Path, split: str) -> list[tuple[Path, str, str]]:
    classes = _subfolders(root)
    if not classes:
        raise InputError(f"{root} holds no folders; expected {LAYOUTS}")
    rows = []
    for folder in classes:
        files = [path for path in folder.rglob("*") if is_image_file(path) and path.is_file()]
        rows += [(path, folder.name, split) for path in files]
        if not files and not split:
            raise InputError(
                f"{folder} holds no images (by their file names); put the images of class "
                f"{folder.name!r} there, or remove the folder"
            )
    if not rows:
        raise InputError(f"{root} holds no images (by their file names) in its class folders")
    return rows


def _subfolders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _rows_of_csv(file: Path, check_files: bool) -> list[tuple[Path, str, str]]:
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
    rows, missing = [], []
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
        rows.append((path, values["label"], SPLIT_NAMES.get(split, "")))
    if missing:
        raise InputError(
            f"{file} lists {len(missing)} files that do not exist, of {len(rows)}: "
            f"{first_few(missing)}. Paths are relative to the CSV's folder."
        )
    without = sum(not split for _, _, split in rows)
    if 0 < without < len(rows):
        raise InputError(
            f"{file} gives a split for {len(rows) - without} of its {len(rows)} rows: "
            "give one for every row, or for none"
        )
    return rows


def _check_classes(classes, samples, needs_val: bool = True) -> None:
    train = {sample.label for sample in samples if sample.split == "train"}
    for label, name in enumerate(classes):
        if label not in train:
            raise InputError(
                f"class {name!r} has no image in the training split; every class needs one"
            )
    if needs_val and not any(sample.split == "val" for sample in samples):
        raise InputError("no readable image is left in the validation split")


def _draw_val(
    classes: tuple[str, ...], samples: list[Sample], fraction: float, seed: int
) -> list[Sample]:
    """Moves a share of every class from train to val: at least one image, never all."""
    rng = np.random.default_rng(seed)
    moved = set()
    for label, name in enumerate(classes):
        members = [i for i, s in enumerate(samples) if s.label == label and s.split == "train"]
        if len(members) < 2:
            raise InputError(
                f"class {name!r} has a single training image, which cannot be split into training "
                "and validation: add images, or give a split column with a val split"
            )
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        moved.update(rng.permutation(members)[:count].tolist())
    return [replace(s, split="val") if i in moved else s for i, s in enumerate(samples)]


def first_few(items: Iterable[object], count: int = 3) -> str:
    """Up to ``count`` items for the end of an error message."""
    items = list(items)
    return ", ".join(map(str, items[:count])) + (", …" if len(items) > count else "")
