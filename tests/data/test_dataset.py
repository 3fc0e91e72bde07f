import os
from collections import Counter

import pytest

from fastadapt.data.dataset import read_dataset, read_unsplit
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders, put_image, write_csv


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


HEADER = ("path", "label", "group", "fold")


@pytest.fixture
def grouped(tmp_path):
    """Rows of eight images of two classes: four patients, of whom each has both, in four folds."""
    root = make_folders(tmp_path / "data", 4, CLASSES[:2])
    paths = sorted(root.rglob("*.png"))
    return [(p, p.parent.name, f"patient {p.stem}", f"f{p.stem}") for p in paths]


def test_groups_are_drawn_whole_and_kept_in_the_splits(tmp_path, grouped):
    dataset = read_dataset(write_csv(tmp_path / "data.csv", grouped, HEADER), 0.25)
    drawn = {s.group for s in dataset.split("val")}
    assert len(drawn) == 1 and len(dataset.split("val")) == 2
    assert not any("groups" in line for line in dataset.summary())
    dataset.write_splits(tmp_path / "splits.csv")
    assert read_dataset(tmp_path / "splits.csv").samples == dataset.samples


def test_groups_in_two_splits_are_warned_of(tmp_path, grouped):
    rows = [
        (path, label, group, "train" if index != 3 else "val")
        for index, (path, label, group, _) in enumerate(grouped)
    ]
    file = write_csv(tmp_path / "data.csv", rows, ("path", "label", "group", "split"))
    warning = "warning: 1 of 4 groups has images in several splits (first 'patient 03': train and"
    assert any(line.startswith(warning) for line in read_dataset(file).summary())


def test_folds_of_a_table_become_splits(tmp_path, grouped):
    file = write_csv(tmp_path / "data.csv", grouped, HEADER)
    dataset = read_dataset(file, val_fold="f01", test_fold="f02")
    found = {s.fold: s.split for s in dataset.samples}
    assert found == {"f00": "train", "f01": "val", "f02": "test", "f03": "train"}
    whole = read_unsplit(file)
    assert {s.split for s in whole.samples} == {"train"} and not whole.val_drawn
    with pytest.raises(InputError, match="`test_fold` needs `val_fold`"):
        read_dataset(file, test_fold="f02")
    with pytest.raises(InputError, match="val_fold is 9; the folds are f00, f01"):
        read_dataset(file, val_fold="9")
    without = write_csv(tmp_path / "without.csv", [row[:2] for row in grouped])
    with pytest.raises(InputError, match="has no column 'fold' with a value in every row"):
        read_dataset(without, val_fold="f01")
    splits = write_csv(tmp_path / "splits.csv", [(*row[:2], "train") for row in grouped])
    with pytest.raises(InputError, match=r"gives splits \(train\), and so does `folds`"):
        read_unsplit(splits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: "nan"}, "line 2: the label is nan, which is no value"),
        ({2: "NaN"}, "line 2: the group is NaN, which is no value"),
        ({2: ""}, "gives a group for 7 of its 8 rows"),
    ],
)
def test_missing_values_are_refused(tmp_path, grouped, change, message):
    grouped[0] = tuple(change.get(place, value) for place, value in enumerate(grouped[0]))
    with pytest.raises(InputError, match=message):
        read_dataset(write_csv(tmp_path / "data.csv", grouped, HEADER))


def test_one_group_cannot_be_split(tmp_path, grouped):
    rows = [(path, label, "all", fold) for path, label, _, fold in grouped]
    with pytest.raises(InputError, match="its images are of too few groups"):
        read_dataset(write_csv(tmp_path / "data.csv", rows, HEADER))


def test_names_that_are_no_text_are_refused(tmp_path):
    for name in (b"a/1.png", b"b/caf\xe9.png"):
        put_image(tmp_path / os.fsdecode(name), len(name))
    with pytest.raises(InputError, match=r"b/caf\\udce9\.png is no text in UTF-8") as caught:
        read_dataset(tmp_path)
    str(caught.value).encode()


def test_names_that_move_the_cursor_and_data_that_is_no_file(tmp_path):
    make_folders(tmp_path / "data", 2, CLASSES[:2])
    (tmp_path / "data" / CLASSES[0]).rename(tmp_path / "data" / "a\x1b[2J")
    with pytest.raises(InputError, match=r"the class name 'a\\x1b\[2J' has control characters"):
        read_dataset(tmp_path / "data")
    with pytest.raises(InputError, match="/dev/null is no folder and no ordinary file; DATA is"):
        read_dataset("/dev/null")
