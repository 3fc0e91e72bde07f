from collections import Counter

import pytest

from fastadapt.data.dataset import read_dataset
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders, write_csv


def by_split(dataset):
    return Counter((s.split, s.label) for s in dataset.samples)


def test_class_folders_are_split_by_class_and_seed(tmp_path):
    root = make_folders(tmp_path / "data", per_class=10)
    (root / CLASSES[0] / "notes.txt").write_text("no image")
    dataset = read_dataset(root, val_fraction=0.2)
    assert dataset.classes == CLASSES
    assert by_split(dataset) == {(s, c): n for s, n in (("train", 8), ("val", 2)) for c in range(3)}
    assert read_dataset(root, 0.2) == dataset
    assert read_dataset(root, 0.2, seed=1) != dataset


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_every_class_is_in_train_and_val(tmp_path, fraction):
    dataset = read_dataset(make_folders(tmp_path / "data", per_class=2), fraction)
    assert set(by_split(dataset).values()) == {1}


def test_split_folders(tmp_path):
    for split, count in (("train", 3), ("valid", 2), ("test", 1)):
        make_folders(tmp_path / split, count)
    dataset = read_dataset(tmp_path)
    assert Counter(s.split for s in dataset.samples) == {"train": 9, "val": 6, "test": 3}


def test_val_is_drawn_where_only_train_and_test_are_given(tmp_path):
    for split in ("train", "test"):
        make_folders(tmp_path / split, 4)
    dataset = read_dataset(tmp_path, 0.25)
    assert Counter(s.split for s in dataset.samples) == {"train": 9, "val": 3, "test": 12}


def test_csv_and_what_is_written_of_it(tmp_path):
    root = make_folders(tmp_path / "data", 4, CLASSES[:2])
    rows = [(p.relative_to(tmp_path), p.parent.name) for p in sorted(root.rglob("*.png"))]
    dataset = read_dataset(write_csv(tmp_path / "data.csv", rows), 0.25)
    assert len(dataset.samples) == 8
    (tmp_path / "run").mkdir()
    dataset.write_splits(tmp_path / "run" / "splits.csv")
    again = read_dataset(tmp_path / "run" / "splits.csv")
    assert again == dataset
    assert again.fingerprint() == dataset.fingerprint()


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_bad_fraction(tmp_path, fraction):
    with pytest.raises(InputError, match="val_fraction"):
        read_dataset(tmp_path, fraction)
