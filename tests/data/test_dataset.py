import csv
from collections import Counter

import pytest

from fastadapt.data.dataset import find_unreadable, read_dataset
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders, truncate


def write_csv(path, rows, header=("path", "label", "split")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header[: len(rows[0])] if rows else header, *rows])
    return path


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


def test_unreadable_images_are_found(tmp_path):
    root = make_folders(tmp_path / "data", 4)
    broken = {root / CLASSES[0] / "00.png", root / CLASSES[1] / "01.png"}
    for path in broken:
        truncate(path)
    dataset = read_dataset(root)
    seen = []
    found = find_unreadable(dataset, workers=2, on_image=lambda: seen.append(1))
    assert {path for path, _ in found} == broken
    assert len(seen) == 12
    assert len(dataset.without(broken).samples) == 10
    gone = [s.path for s in dataset.samples if s.label == 0]
    with pytest.raises(InputError, match="'crossed' has no image in the training split"):
        dataset.without(gone)


def folder_case(name):
    def make(tmp_path):
        root = tmp_path / "data"
        root.mkdir()
        if name == "flat":
            make_folders(tmp_path / "more", 1, CLASSES[:1])
            (tmp_path / "more" / CLASSES[0] / "00.png").rename(root / "00.png")
        elif name == "no images":
            (root / "a").mkdir()
            (root / "a" / "notes.txt").write_text("")
        elif name == "one class":
            make_folders(root / "x", 3, CLASSES[:1])
            return root / "x"
        elif name == "single image":
            make_folders(root / "x", 1)
            return root / "x"
        elif name == "empty class":
            make_folders(root / "x", 2)
            (root / "x" / "nothing").mkdir()
            return root / "x"
        elif name == "unknown split folder":
            for split in ("train", "val", "holdout"):
                make_folders(root / split, 1)
        elif name == "class missing in train":
            make_folders(root / "train", 2, CLASSES[:2])
            make_folders(root / "val", 1)
        return root

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp_path: tmp_path / "nowhere", "does not exist"),
        (folder_case("empty"), "holds no folders"),
        (folder_case("flat"), "holds no folders"),
        (folder_case("no images"), "holds no images"),
        (folder_case("one class"), "one class only, 'crossed'"),
        (folder_case("single image"), "'crossed' has a single training image"),
        (folder_case("empty class"), "class 'nothing'"),
        (folder_case("unknown split folder"), "holdout"),
        (folder_case("class missing in train"), "'upright' has no image in the training split"),
    ],
)
def test_bad_folders(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        read_dataset(make(tmp_path))


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


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_bad_fraction(tmp_path, fraction):
    with pytest.raises(InputError, match="val_fraction"):
        read_dataset(tmp_path, fraction)
