from collections import Counter

import pytest

from fastadapt.data.dataset import read_dataset
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders, write_csv


def test_csv_with_splits(tmp_path):
    root = make_folders(tmp_path / "data", 3, CLASSES[:2])
    splits = ("train", "Val", "test")
    rows = [
        (p, p.parent.name, split)
        for kind in CLASSES[:2]
        for p, split in zip(sorted((root / kind).iterdir()), splits, strict=True)
    ]
    dataset = read_dataset(write_csv(tmp_path / "data.csv", rows))
    assert Counter(s.split for s in dataset.samples) == {"train": 2, "val": 2, "test": 2}


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (("file", "label"), [("a.png", "x")], "no column 'path'.*file, label"),
        (("path", "class"), [("a.png", "x")], "no column 'label'"),
        (("path", "label"), [], "no rows"),
        (("path", "label"), [("a.png", " ")], "line 2: the label is empty"),
        (("path", "label"), [("", "x")], "line 2: the path is empty"),
        (("path", "label", "split"), [("a.png", "x", "dev")], "unknown split 'dev'"),
        (("path", "label"), [(f"{i}.png", "x") for i in range(9)], "9 files.*do not exist.*0.png"),
    ],
)
def test_bad_csv(tmp_path, header, rows, message):
    with pytest.raises(InputError, match=message):
        read_dataset(write_csv(tmp_path / "data.csv", rows, header))


def test_csv_that_contradicts_itself(tmp_path):
    root = make_folders(tmp_path / "data", 2, CLASSES[:2])
    paths = sorted(root.rglob("*.png"))
    rows = [(p, p.parent.name, "train") for p in paths]
    twice = write_csv(tmp_path / "twice.csv", [*rows, (paths[0], CLASSES[0], "val")])
    with pytest.raises(InputError, match=r"00\.png first \(train, val\)"):
        read_dataset(twice)
    half = write_csv(tmp_path / "half.csv", [*rows[:3], (*rows[3][:2], "")])
    with pytest.raises(InputError, match="3 of its 4 rows"):
        read_dataset(half)


def test_csv_that_is_no_text(tmp_path):
    (tmp_path / "data.csv").write_bytes(b"\xff\xfe\x00\x01path")
    with pytest.raises(InputError, match="UTF-8"):
        read_dataset(tmp_path / "data.csv")
