"""Read classes and splits from folders: class folders, or split folders with such in them.

Two layouts are understood, and no third is guessed::

    DATA/cat/1.png            DATA/train/cat/1.png
    DATA/dog/2.png            DATA/test/dog/2.png

Whatever is neither (images in folders below class folders, a folder one level too high, classes
named like splits) is refused with the remedy: flattened, it would be another data set.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from fastadapt.data.splits import split_of
from fastadapt.data.walker import WalkReport, list_entries, walk_folder
from fastadapt.errors import InputError, counted, first_few
from fastadapt.written_folders import is_ours

LAYOUTS = "class folders, train/ and val/ with class folders in them, or a CSV with path and label"
CSV = "list the files in a CSV with path and label"


class LabeledFile(NamedTuple):
    """An image file as a folder or a table lists it.

    Attributes:
        path: absolute.
        label: the class's name.
        split: ``"train"``, ``"val"``, ``"test"``, or ``""`` where none is given.
        group: what images have in common that stay in one split; ``""`` where none is given.
        fold: the fold's name in the table; ``""`` where none is given.
    """

    path: Path
    label: str
    split: str
    group: str = ""
    fold: str = ""


def list_folder(root: Path, report: WalkReport) -> list[LabeledFile]:
    """List the images of class folders, with or without split folders around them.

    Args:
        root: absolute.
        report: where to count what is left out.

    Raises:
        InputError: the folder has neither layout, a class has no images, a folder beside the
            splits is none, or two folders are the same split.
    """
    if is_ours(root):
        raise InputError(f"{root} is a run or a bundle, which fastadapt wrote; DATA is {LAYOUTS}")
    loose, folders = list_entries(root, report)
    splits = [folder for folder in folders if split_of(folder.name)]
    if not splits:
        return _list_classes(root, "", report, loose, folders)
    if not any(_subfolders(folder) for folder in splits):
        names = first_few(f"{folder.name}/" for folder in splits)
        if len(splits) == len(folders):
            raise InputError(
                f"{root} holds the splits {names}, but no class folders in them; expected {LAYOUTS}"
            )
        raise _class_named_like_split(splits[0])
    for path in loose:
        report.skip(path, "images outside class folders")
    by_split: dict[str, Path] = {}
    for folder in folders:
        split = split_of(folder.name)
        if not split:
            if any(walk_folder(folder, report)):
                raise InputError(
                    f"{folder} stands beside {splits[0].name}/, but is no split: expected train, "
                    f"val or test. Move it out of {root}, or {CSV}."
                )
            report.skip(folder, "folders without images")
        elif split in by_split:
            raise InputError(
                f"{root} has two folders for the {split} split, {by_split[split].name}/ and "
                f"{folder.name}/: merge them, or move one out"
            )
        else:
            by_split[split] = folder
    return [
        file
        for split, folder in by_split.items()
        for file in _list_classes(folder, split, report, *list_entries(folder, report))
    ]


def _list_classes(
    root: Path, split: str, report: WalkReport, loose: list[Path], folders: list[Path]
) -> list[LabeledFile]:
    """List the images of the class folders in ``root``, whose entries are given."""
    if not folders:
        have = f", but {counted(len(loose), 'image')} without a class" if loose else ""
        raise InputError(f"{root} holds no folders{have}; expected {LAYOUTS}")
    for path in loose:
        report.skip(path, "images outside class folders")
    found: dict[Path, list[Path]] = {}
    reports: dict[Path, WalkReport] = {}
    deep: dict[Path, list[Path]] = {}
    above = (os.path.realpath(root.parent), os.path.realpath(root))
    for folder in folders:
        if split_of(folder.name):
            raise _class_named_like_split(folder)
        own = reports[folder] = WalkReport()
        found[folder], below = list_entries(folder, own, above)
        inside = (*above, os.path.realpath(folder))
        with_images = [inner for inner in below if any(walk_folder(inner, own, inside))]
        report.add(own)
        if with_images:
            deep[folder] = with_images
    if deep:
        raise _wrong_depth(root, len(folders), deep)
    if not any(found.values()):
        raise InputError(
            f"{root} holds no images (by their file names) in its class folders{_beside(report)}"
        )
    files = []
    for folder, images in found.items():
        if not images and not split and not reports[folder].runs:
            raise InputError(
                f"{folder} holds no images (by their file names){_beside(reports[folder])}; put "
                f"the images of class {folder.name!r} there, or remove the folder"
            )
        files += [LabeledFile(path, folder.name, split) for path in images]
    return files


def _wrong_depth(root: Path, count: int, deep: dict[Path, list[Path]]) -> InputError:
    """Say what to give instead, where images lie deeper than class folders."""
    first, inner = next(iter(deep.items()))
    names = [{path.name.casefold() for path in below} for below in deep.values()]
    if count == 1 or any(split_of(path.name) for path in inner):
        return InputError(f"{root} is one level too high: give {first}")
    common = set.intersection(*names)
    if len(deep) > 1 and common:
        return InputError(
            f"{root} is one level too high: its folders {first_few(p.name for p in deep)} hold the "
            f"same class names ({first_few(sorted(common))}). Give one of them, such as {first}, "
            f"or {CSV}."
        )
    return InputError(
        f"{first} holds images in folders below it ({first_few(p.name for p in inner)}), which may "
        f"be classes of their own: put the images into the class folder itself, or {CSV}"
    )


def _class_named_like_split(folder: Path) -> InputError:
    return InputError(
        f"{folder} stands among class folders, but is named like a split: if it is a split, put "
        f"class folders into it and nothing but splits beside it; if {folder.name!r} is a class, "
        f"rename the folder, or {CSV}"
    )


def _beside(report: WalkReport) -> str:
    """Name what was left out on the way, for an error that says that nothing is there."""
    counts = sorted(
        ((count, reason) for reason, (count, _) in report.skipped.items()), reverse=True
    )
    reasons = [f"{count} {reason}" for count, reason in counts]
    return f"; left out were {first_few(reasons)}" if reasons else ""


def _subfolders(folder: Path) -> list[Path]:
    return list_entries(folder, WalkReport())[1]
