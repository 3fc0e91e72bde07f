"""Images are found one by one, in folders, patterns, tables and lists; labels where asked for."""

import io
import itertools
import os
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastadapt as fa
from fastadapt.export.predict.sources import ImageList, Item
from fastadapt.files import open_text
from tests.helpers.imagesets import put_image


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "good/b.png", "good/deep/c.jpg", "crack/d.png"):
        put_image(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.md").write_text("x")
    return tmp_path


def found(folder, *sources, **more):
    images = ImageList([str(s) for s in sources], classes=("crack", "good"), **more)
    images.check()
    images.check_labels()
    return [(str(item.path).removeprefix(f"{folder}/"), item.label) for item in images]


def test_folders_patterns_files_and_lists(folder):
    images = folder / "images"
    everything = ["images/a.png", "images/crack/d.png", "images/good/b.png"]
    everything.append("images/good/deep/c.jpg")
    assert [path for path, _ in found(folder, images)] == everything
    assert found(folder, f"{images}/*/*.png", images / "a.png") == [
        ("images/crack/d.png", ""),
        ("images/good/b.png", ""),
        ("images/a.png", ""),
    ]
    listed = images / "list.txt"
    listed.write_bytes("\ufeffa.png\r\n\r\n good/b.png \r\n".encode("utf-16-le"))
    assert found(folder, listed) == [("images/a.png", ""), ("images/good/b.png", "")]


def test_standard_input(folder, monkeypatch):
    text = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfx/a.png\n\ncaf\xe9.png\r\n"))
    monkeypatch.setattr(sys, "stdin", text)
    images = ImageList(["-"])
    images.check()
    assert not images.countable
    assert list(images) == [Item("x/a.png"), Item("caf\udce9.png")]


@pytest.mark.parametrize(
    "table",
    [
        "path,class\na.png,good\n\nb.png,\n",
        "sep=;\nclass;Path\n good ; a.png\n;b.png\n",
        'id\tpath\tclass\n"1"\ta.png\tgood\n2\tb.png\n',
    ],
)
def test_tables(folder, table):
    file = folder / "table.csv"
    file.write_text(table)
    assert found(folder, file) == [("a.png", ""), ("b.png", "")]
    assert found(folder, file, labels="class") == [("a.png", "good"), ("b.png", "")]


def test_labels_from_folders(folder):
    assert found(folder, folder / "images" / "good", labels="folders") == [
        ("images/good/b.png", "good"),
        ("images/good/deep/c.jpg", "good"),
    ]
    said = (
        r"^1 of 4 images lies in no folder that .* of a class of the model, .*a\.png for one; its"
    )
    with pytest.raises(fa.InputError, match=said):
        found(folder, folder / "images", labels="folders")


def test_labels_are_checked_before_any_work(folder, monkeypatch):
    file = folder / "table.csv"
    rows = "path,label\na.png,good\nb.png,god\nc.png,\nd.png,Crack\n"
    file.write_text(rows)
    with pytest.raises(fa.InputError) as raised:
        found(folder, file, labels="label")
    assert str(raised.value) == (
        f"2 of 4 labels are no class of the model, 'god' of {folder}/b.png for one; its classes "
        "are crack, good: correct them, or leave a cell empty where the class is not known"
    )
    # What can be read once is counted as it comes, and told at the end.
    text = io.TextIOWrapper(io.BytesIO(b"x/good/a.png\nx/b.png\n"))
    monkeypatch.setattr(sys, "stdin", text)
    images = ImageList(["-"], "folders", ("crack", "good"))
    images.check_labels()
    assert list(images) == [Item("x/good/a.png", "good"), Item("x/b.png")]
    assert images.lines() == [
        "1 image lies in no folder that has the name of a class of the model, x/b.png for one: "
        "left out of the metrics"
    ]


def test_counting(folder):
    assert ImageList([str(folder / "images"), str(folder / "images" / "a.png")]).count() == 5


@pytest.mark.parametrize(
    ("text", "labels", "says"),
    [
        ("file,label\na,b\n", None, "has no column 'path'; its columns are file, label"),
        ("path,label\na,b\n", "class", "has no column 'class'; its columns are path, label"),
        ("path\n\n,\n'a'\n\"b\n", None, "line 5 is no row of a CSV"),
        ("path,label\n,good\n", None, "line 2: the path is empty"),
        ("path,label\na.png,god\n", "label", "1 of 1 label is no class of the model, 'god' of"),
        ("", None, "has no column 'path'; its columns are none"),
        ("path\0\n", None, "cannot be read as text"),
    ],
)
def test_tables_that_are_none(folder, text, labels, says):
    file = folder / "table.csv"
    file.write_text(text)
    with pytest.raises(fa.InputError, match=says):
        found(folder, file, labels=labels)


def test_sources_are_checked_before_any_work(folder):
    for source, says in (("gone", "gone does not exist"), ("gone/*.png", "matches no image")):
        with pytest.raises(fa.InputError, match=says):
            ImageList([str(folder / "images"), source]).check()
    with pytest.raises(fa.InputError, match="is no table"):
        ImageList([str(folder / "images")], "label").check()


def test_long_lists_are_read_piece_by_piece(folder):
    file = folder / "long.csv"
    with file.open("w") as target:
        target.write("path\n")
        target.writelines(f"{n}.png\n" for n in range(200_000))
    first = list(itertools.islice(ImageList([str(file)]), 2))
    assert [item.path for item in first] == [str(folder / "0.png"), str(folder / "1.png")]
    assert ImageList([str(file)]).count() == 200_000


def test_text_of_any_encoding(tmp_path):
    file = tmp_path / "text.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        file.write_bytes("é\r\n".encode(encoding))
        with open_text(file) as text:
            assert text.read() == "é\n"
    with pytest.raises(fa.InputError, match="does not exist"), open_text(tmp_path / "gone"):
        pass


def test_more_values_than_columns(folder):
    (folder / "a.csv").write_text("path,label\nimages/a.png,crack,good\n")
    with pytest.raises(fa.InputError, match="line 2 has 3 values for 2 columns"):
        found(folder, folder / "a.csv", labels="label")


def test_paths_of_windows(folder):
    (folder / "a.csv").write_text("path\nimages\\good\\b.png\n")
    (folder / "a.txt").write_text("images\\good\\b.png\r\n")
    for name in ("a.csv", "a.txt"):
        assert found(folder, folder / name) == [("images/good/b.png", "")]


NAMES = st.text(st.sampled_from(" \t\u00a0\u2028aé,'"), min_size=1, max_size=8)


@given(name=NAMES.filter(str.strip))
@settings(max_examples=40, deadline=None)
def test_names_with_spaces_around_them(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    (folder / name).write_bytes(b"")
    (folder / "list.txt").write_text(f"{name}\n", encoding="utf-8-sig")
    assert list(ImageList([str(folder / "list.txt")])) == [Item(str(folder / name))]
    # A name on standard input begins with its folder; what is to be stripped is at its end.
    stdin = io.TextIOWrapper(io.BytesIO(f"{folder}/{name}\r\n".encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        assert list(ImageList(["-"])) == [Item(str(folder / name))]


def test_pipes_are_refused_before_any_work(folder):
    os.mkfifo(folder / "pipe.csv")
    with pytest.raises(fa.InputError, match=r"pipe\.csv is a pipe, a socket or a device"):
        ImageList([str(folder / "pipe.csv")]).check()
