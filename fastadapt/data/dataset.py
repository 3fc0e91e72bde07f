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

from fastadapt.data.class_folders import LAYOUTS, list_folder
from fastadapt.data.splits import draw_val
from fastadapt.data.table import list_table
from fastadapt.data.walker import WalkReport
from fastadapt.errors import InputError, first_few
from fastadapt.files import write_text


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
        _check_classes(self.classes, kept)
        return replace(self, samples=kept)

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
        return lines

    def csv(self) -> str:
        """Return ``path,label,split``, one sample a line; readable by :func:`read_dataset`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("path", "label", "split"))
        writer.writerows((s.path, self.classes[s.label], s.split) for s in self.samples)
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
    check_files: bool = True,
) -> Dataset:
    """Find labelled images and split them.

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
    report = WalkReport()
    if root.is_dir():
        files = list_folder(root, report)
    elif root.is_file():
        files = list_table(root, check_files)
    else:
        raise InputError(f"{data} does not exist; DATA is {LAYOUTS}")

    counts = Counter(file.path for file in files)
    if len(counts) < len(files):
        twice = next(path for path, count in counts.items() if count > 1)
        splits = sorted({file.split or "no split" for file in files if file.path == twice})
        raise InputError(
            f"{data} lists {len(files) - len(counts)} files more than once, {twice} first "
            f"({', '.join(splits)}): list each file once"
        )
    classes = tuple(sorted({file.label for file in files}))
    if len(classes) < 2:
        raise InputError(f"{data} has one class only, {classes[0]!r}; expected at least two")
    for name in classes:
        if len(f"{name}.".splitlines()) > 1:
            raise InputError(f"{data}: the class name {name!r} has more than one line: rename it")
    index = {name: i for i, name in enumerate(classes)}
    samples = [Sample(f.path, index[f.label], f.split or "train") for f in sorted(files)]
    _check_classes(classes, samples, needs_val=False)
    val_drawn = not any(sample.split == "val" for sample in samples)
    if val_drawn:
        training = [i for i, sample in enumerate(samples) if sample.split == "train"]
        labels = [samples[i].label for i in training]
        for drawn in draw_val(classes, labels, val_fraction, seed):
            samples[training[drawn]] = replace(samples[training[drawn]], split="val")
    return Dataset(classes, tuple(samples), tuple(report.lines()), val_drawn)


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
