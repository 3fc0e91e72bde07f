"""Find the image files below a folder, and the class and split that their folders give them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastadapt.data.splits import SPLIT_NAMES
from fastadapt.errors import InputError

EXTENSIONS = frozenset(Image.registered_extensions())
LAYOUTS = "class folders, train/ and val/ with class folders in them, or a CSV with path and label"


class LabeledFile(NamedTuple):
    """An image file as a folder or a table lists it.

    Attributes:
        path: absolute.
        label: the class's name.
        split: ``"train"``, ``"val"``, ``"test"``, or ``""`` where none is given.
    """

    path: Path
    label: str
    split: str


def is_image_file(path: Path) -> bool:
    """Say whether a file's name is that of an image; hidden files are none."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def list_folder(root: Path) -> list[LabeledFile]:
    """List the images of class folders, with or without split folders around them.

    Raises:
        InputError: there are no class folders, one is empty, or a folder beside ``train/`` is no
            split.
    """
    folders = _subfolders(root)
    if not any(folder.name == "train" and _subfolders(folder) for folder in folders):
        return _list_classes(root, "")
    for folder in folders:
        if folder.name not in SPLIT_NAMES:
            raise InputError(
                f"{folder} stands beside train/, but is no split: expected train, val or test"
            )
    return [file for folder in folders for file in _list_classes(folder, SPLIT_NAMES[folder.name])]


def _list_classes(root: Path, split: str) -> list[LabeledFile]:
    classes = _subfolders(root)
    if not classes:
        raise InputError(f"{root} holds no folders; expected {LAYOUTS}")
    files = []
    for folder in classes:
        found = [path for path in folder.rglob("*") if is_image_file(path) and path.is_file()]
        files += [LabeledFile(path, folder.name, split) for path in found]
        if not found and not split:
            raise InputError(
                f"{folder} holds no images (by their file names); put the images of class "
                f"{folder.name!r} there, or remove the folder"
            )
    if not files:
        raise InputError(f"{root} holds no images (by their file names) in its class folders")
    return files


def _subfolders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
