import csv
import io
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadapt.data.dataset import read_dataset, read_unsplit
from fastadapt.data.splits import split_of
from fastadapt.data.table import NO_VALUES, list_table
from fastadapt.errors import InputError
from tests.helpers.imagesets import CLASSES, make_folders, put_image, write_csv


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


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("sep_line", [False, True])
def test_tables_of_spreadsheets(tmp_path, encoding, separator, sep_line):
    root = make_folders(tmp_path / "data", 2, CLASSES[:2])
    lines = [f"sep={separator}"] if sep_line else []
    lines += [separator.join(("Path", "LABEL", "note", "Split"))]
    for index, path in enumerate(sorted(root.rglob("*.png"))):
        split = ("Training", "Validation")[index % 2]
        name = str(path.relative_to(tmp_path)).replace("/", "\\")
        lines.append(separator.join((name, f"Straße {index // 2}", '"a, b; c"', split)))
    lines.append(separator * 3)  # an empty row of a spreadsheet
    (tmp_path / "data.csv").write_bytes("\r\n".join(lines).encode(encoding))
    dataset = read_dataset(tmp_path / "data.csv")
    assert dataset.classes == ("Straße 0", "Straße 1")
    assert Counter((s.split, s.label) for s in dataset.samples) == {
        ("train", 0): 1,
        ("val", 0): 1,
        ("train", 1): 1,
        ("val", 1): 1,
    }


def test_a_value_too_many_is_refused(tmp_path):
    put_image(tmp_path / "a.png")
    (tmp_path / "data.csv").write_text("path,label\na.png,cat, small\n")
    with pytest.raises(InputError, match="line 2 has 3 values for 2 columns"):
        read_dataset(tmp_path / "data.csv")


def test_a_label_column_of_splits_is_refused(tmp_path):
    rows = [(put_image(tmp_path / f"{i}.png"), ("train", "Test")[i % 2]) for i in range(4)]
    with pytest.raises(InputError, match="name that column 'split'"):
        read_dataset(write_csv(tmp_path / "data.csv", rows))


def test_a_class_named_like_a_split_is_taken_from_a_table(tmp_path):
    rows = [(put_image(tmp_path / f"{i}.png"), ("train", "bus")[i % 2]) for i in range(4)]
    assert read_dataset(write_csv(tmp_path / "data.csv", rows)).classes == ("bus", "train")


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "data.csv").write_text("path,label,label\na.png,x,y\n")
    with pytest.raises(InputError, match="'label' 2 times"):
        read_dataset(tmp_path / "data.csv")


CELL = st.text(
    st.characters(codec="cp1252", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=8
).map(str.strip)


def is_label(text):
    return text and not split_of(text) and text.casefold() not in NO_VALUES


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(CELL.filter(is_label), min_size=2, max_size=5),
    encoding=st.sampled_from(ENCODINGS),
    separator=st.sampled_from(",;\t"),
    end=st.sampled_from(("\n", "\r\n")),
    quoting=st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
)
def test_every_dialect_gives_the_same_rows(
    tmp_path_factory, labels, encoding, separator, end, quoting
):
    folder = tmp_path_factory.mktemp("table")
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerows([("path", "label"), *((f"{i}.png", x) for i, x in enumerate(labels))])
    (folder / "data.csv").write_bytes(text.getvalue().encode(encoding))
    files = list_table(folder / "data.csv", check_files=False)
    assert [(f.path, f.label) for f in files] == [
        (folder / f"{i}.png", label) for i, label in enumerate(labels)
    ]


def test_a_name_that_no_file_can_have(tmp_path):
    (tmp_path / "data.csv").write_text(f"path,label\n{'a' * 300}.png,crack\n")
    with pytest.raises(InputError, match="1 file that does not exist"):
        list_table(tmp_path / "data.csv")


def test_columns_that_are_not_used_are_told(tmp_path):
    root = make_folders(tmp_path / "data", 2, CLASSES[:2])
    rows = [(p, p.parent.name, "", "p", n) for n, p in enumerate(sorted(root.rglob("*.png")))]
    for header, said in (
        (("path", "label", "split", "patient", "Age"), ["patient, age (a column group keeps"]),
        (("path", "label", "split", "group", "age"), ["not used: age"]),
        (("path", "label", "split", "group", "fold"), []),
    ):
        found = read_unsplit(write_csv(tmp_path / "t.csv", rows, header)).left_out
        assert len(found) == len(said)
        assert all(text in line for text, line in zip(said, found, strict=True))
