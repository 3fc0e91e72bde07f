"""Read a data set of labelled image files, check it, and split it."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastadapt.data.class_folders import LAYOUTS, LabeledFile, list_folder
from fastadapt.data.folds import chosen_folds
from fastadapt.data.splits import SPLITS, draw_val, draw_val_groups
from fastadapt.data.table import list_table
from fastadapt.data.walker import WalkReport
from fastadapt.errors import InputError, counted, first_few, form
from fastadapt.files import write_text


@dataclass(frozen=True)
class Sample:
    """One image file.

    Attributes:
        path: absolute.
        label: index into the data set's classes.
        split: ``"train"``, ``"val"`` or ``"test"``.
        group: what it has in common with images that stay in its split; ``""`` if none is given.
        fold: its fold's name in the table; ``""`` if none is given.
    """

    path: Path
    label: int
    split: str
    group: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Dataset:
    """Labelled image files with their splits.

    Attributes:
        classes: names, sorted.
        samples: sorted by path.
        left_out: lines that say which files of the folder are no samples, and why.
        val_drawn: whether validation was drawn from training here.
    """

    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    left_out: tuple[str, ...] = field(default=(), compare=False)
    val_drawn: bool = field(default=False, compare=False)

    def split(self, *names: str) -> list[Sample]:
        """Return the samples of these splits."""
        return [sample for sample in self.samples if sample.split in names]

    def without(self, paths: Iterable[Path]) -> Dataset:
        """Leave some files out.

        Raises:
            InputError: a class loses its last training image, or validation its last image.
        """
        dropped = set(paths)
        kept = tuple(sample for sample in self.samples if sample.path not in dropped)
        _check_classes(self.classes, kept, needs_val=bool(self.split("val")))
        return replace(self, samples=kept)

    def with_splits(self, splits: Sequence[str]) -> Dataset:
        """Return the images with other splits, one for each.

        Raises:
            InputError: a class has no training image.
        """
        pairs = zip(self.samples, splits, strict=True)
        samples = tuple(replace(sample, split=split) for sample, split in pairs)
        _check_classes(self.classes, samples, needs_val="val" in splits)
        return replace(self, samples=samples, val_drawn=False)

    def summary(self) -> list[str]:
        """Say in lines for the terminal what was found: classes with counts, what was left out."""
        counts = Counter(sample.label for sample in self.samples)
        named = [f"{name} {counts[label]}" for label, name in enumerate(self.classes)]
        lines = [f"images by class: {first_few(named, 20)}", *self.left_out]
        alike: dict[str, list[str]] = {}
        for name in self.classes:
            alike.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
        lines += [
            f"warning: the classes {', '.join(map(repr, names))} differ in case or encoding only"
            for names in alike.values()
            if len(names) > 1
        ]
        return lines + self._torn_groups()

    def _torn_groups(self) -> list[str]:
        """Warn of groups that have images in two splits."""
        splits: dict[str, set[str]] = {}
        for sample in self.samples:
            if sample.group:
                splits.setdefault(sample.group, set()).add(sample.split)
        torn = {group: found for group, found in splits.items() if len(found) > 1}
        if not torn:
            return []
        group, found = next(iter(torn.items()))
        where = " and ".join(split for split in SPLITS if split in found)
        return [
            f"warning: {len(torn)} of {counted(len(splits), 'group')} "
            f"{form(len(torn), 'has', 'have')} images in several splits (first "
            f"{group!r}: {where}): their scores say nothing of new groups"
        ]

    def csv(self) -> str:
        """Return ``path,label,split``, one sample a line; readable by :func:`read_dataset`.

        Groups and folds follow, where there are some.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        more = [name for name in ("group", "fold") if any(getattr(s, name) for s in self.samples)]
        writer.writerow(("path", "label", "split", *more))
        for sample in self.samples:
            row = (sample.path, self.classes[sample.label], sample.split)
            writer.writerow((*row, *(getattr(sample, name) for name in more)))
        return text.getvalue()

    def write_splits(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`csv`, with absolute paths, whole or not at all."""
        write_text(path, self.csv())

    def fingerprint(self) -> str:
        """Hash paths, labels and splits."""
        return hashlib.sha256(self.csv().encode()).hexdigest()


def read_dataset(
    data: str | os.PathLike[str],
    val_fraction: float = 0.2,
    seed: int = 0,
    *,
    val_fold: str | None = None,
    test_fold: str | None = None,
    check_files: bool = True,
) -> Dataset:
    """Find labelled images and split them.

    Args:
        data: a folder of class folders; a folder with ``train/``, ``val/`` and ``test/`` of such
            folders; or a CSV with columns ``path`` (relative to the CSV, or absolute), ``label``
            and optionally ``split``, ``group`` and ``fold``. Without a val split, one is drawn
            from train, in whole groups where there are groups.
        val_fraction: share of each class that is drawn for validation, where val is not given.
        seed: of that draw, which is stratified by class.
        val_fold: name of the fold that validates, of the CSV's column ``fold``.
        test_fold: name of the fold that tests.
        check_files: whether a CSV's files must exist.

    Returns:
        The data set; every class is in train, and in val if that was drawn here.

    Raises:
        InputError: nothing there, fewer than two classes, a class that cannot be split, a CSV
            that lacks columns, files or labels, an unknown split or fold, a file that is listed
            twice.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}; expected more than 0, less than 1")
    dataset, files = _read(data, check_files)
    if val_fold is not None or test_fold is not None:
        if val_fold is None:
            raise InputError("`test_fold` needs `val_fold`, the fold that picks the epoch")
        _check_unsplit(data, files, "`val_fold`")
        if not all(sample.fold for sample in dataset.samples):
            raise InputError(f"{data} has no column 'fold' with a value in every row")
        names = [sample.fold for sample in dataset.samples]
        return dataset.with_splits(chosen_folds(names, val_fold, test_fold))
    if dataset.split("val"):
        return dataset
    samples = list(dataset.samples)
    training = [i for i, sample in enumerate(samples) if sample.split == "train"]
    labels = [samples[i].label for i in training]
    groups = [samples[i].group for i in training]
    if any(groups):
        drawn = draw_val_groups(dataset.classes, labels, groups, val_fraction, seed)
    else:
        drawn = draw_val(dataset.classes, labels, val_fraction, seed)
    for place in drawn:
        samples[training[place]] = replace(samples[training[place]], split="val")
    return replace(dataset, samples=tuple(samples), val_drawn=True)


def read_unsplit(data: str | os.PathLike[str], *, check_files: bool = True) -> Dataset:
    """Find labelled images that have no splits: all are for training, until folds are drawn.

    Args:
        data, check_files: as for :func:`read_dataset`.

    Raises:
        InputError: as for :func:`read_dataset`; the data give splits.
    """
    dataset, files = _read(data, check_files)
    _check_unsplit(data, files, "`folds`")
    return dataset


def _check_unsplit(data: str | os.PathLike[str], files: Iterable[LabeledFile], asked: str) -> None:
    splits = sorted({file.split for file in files if file.split}, key=SPLITS.index)
    if splits:
        raise InputError(
            f"{data} gives splits ({', '.join(splits)}), and so does {asked}: leave one of them "
            "out (a CSV's column 'split' can be removed, or set it aside as data of its own)"
        )


def _read(data: str | os.PathLike[str], check_files: bool) -> tuple[Dataset, Sequence[LabeledFile]]:
    """Find labelled images, with the splits that are given; what has none is for training."""
    root = Path(data).absolute()
    report = WalkReport()
    if root.is_dir():
        files = list_folder(root, report)
    elif root.is_file():
        files = list_table(root, check_files, report)
    else:
        what = "is no folder and no ordinary file" if root.exists() else "does not exist"
        raise InputError(f"{data} {what}; DATA is {LAYOUTS}")

    for file in files:
        _check_text(file.path, file.label)
    counts = Counter(file.path for file in files)
    if len(counts) < len(files):
        twice = next(path for path, count in counts.items() if count > 1)
        splits = sorted({file.split or "no split" for file in files if file.path == twice})
        raise InputError(
            f"{data} lists {counted(len(files) - len(counts), 'file')} more than once, {twice} "
            "first "
            f"({', '.join(splits)}): list each file once"
        )
    classes = tuple(sorted({file.label for file in files}))
    if len(classes) < 2:
        raise InputError(f"{data} has one class only, {classes[0]!r}; expected at least two")
    for name in classes:
        if len(f"{name}.".splitlines()) > 1:
            raise InputError(f"{data}: the class name {name!r} has more than one line: rename it")
        if any(unicodedata.category(letter) == "Cc" for letter in name):
            raise InputError(
                f"{data}: the class name {name!r} has control characters, which move a terminal's "
                "cursor: rename it"
            )
    index = {name: i for i, name in enumerate(classes)}
    samples = [
        Sample(f.path, index[f.label], f.split or "train", f.group, f.fold) for f in sorted(files)
    ]
    _check_classes(classes, samples, needs_val=False)
    return Dataset(classes, tuple(samples), tuple(report.lines())), files


def _check_text(path: Path, label: str) -> None:
    """Refuse a name that no text file can hold: its bytes are not UTF-8.

    Raises:
        InputError: as said.
    """
    for name in (str(path), label):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{ascii(name)[1:-1]} is no text in UTF-8, which results are written in: rename it "
                "(convmv -f latin1 -t utf8 does many at once)"
            ) from None


def _check_classes(
    classes: Sequence[str], samples: Iterable[Sample], needs_val: bool = True
) -> None:
    splits = {(sample.split, sample.label) for sample in samples}
    for label, name in enumerate(classes):
        if ("train", label) not in splits:
            raise InputError(
                f"class {name!r} has no image in the training split; every class needs one"
            )
    if needs_val and not any(split == "val" for split, _ in splits):
        raise InputError("no readable image is left in the validation split")
