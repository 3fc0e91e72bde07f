import errno
import itertools
import os

import pytest

from fastadapt.data.walker import MANY_RUNS, WalkReport, walk
from fastadapt.errors import InputError
from tests.helpers.imagesets import put_image


def names(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.png", "a.png", "x/c.jpg", "x/y/d.tif", "x/.hidden/e.png", "@eaDir/f.png"):
        put_image(tmp_path / name)
    (tmp_path / "x" / "notes.txt").write_text("")
    return tmp_path


def test_a_folder_is_walked_to_its_depth(tree):
    report = WalkReport()
    assert names(walk(tree, report), tree) == ["a.png", "b.png", "x/c.jpg", "x/y/d.tif"]
    assert {reason: count for reason, (count, _) in report.skipped.items()} == {
        "hidden": 1,
        "folders of a system": 1,
        ".txt files": 1,
    }
    assert len(report.lines()) == 1


def test_files_folders_patterns_and_lists_in_one_call(tree):
    report = WalkReport()
    (tree / "list.txt").write_bytes("\ufeffb.png\r\n\r\nx/c.jpg\r\n".encode("utf-16-le"))
    (tree / "odd.name").write_bytes(b"")
    sources = [tree / "x" / "y", str(tree / "odd.name"), str(tree / "*.*"), tree / "list.txt"]
    assert names(walk(sources, report), tree) == [
        "x/y/d.tif",
        "odd.name",  # named by the user, whatever its name
        "a.png",
        "b.png",
        "b.png",
        "x/c.jpg",
    ]
    assert report.skipped[".name files"][0] == 1
    assert names(walk(str(tree / "**" / "*.tif")), tree) == ["x/y/d.tif"]


def test_files_come_one_by_one(tree):
    def sources():
        yield tree / "a.png"
        yield tree / "x"
        raise AssertionError("asked for more than was needed")

    assert names(itertools.islice(walk(sources()), 2), tree) == ["a.png", "x/c.jpg"]


@pytest.mark.parametrize("source", ["gone.png", "gone", "gone/*.png"])
def test_what_is_not_there_is_named(tree, source):
    with pytest.raises(InputError, match="gone"):
        list(walk(str(tree / source)))


def test_links_in_a_circle_end(tree):
    (tree / "x" / "y" / "up").symlink_to(tree)
    (tree / "x" / "self").symlink_to(tree / "x")
    assert names(walk(tree), tree) == ["a.png", "b.png", "x/c.jpg", "x/y/d.tif"]


def test_a_link_to_a_folder_above_gives_no_image_twice(tree):
    (tree / "x" / "up").symlink_to(tree)
    report = WalkReport()
    assert sorted(path.name for path in walk(tree / "x", report)) == [
        "a.png",
        "b.png",
        "c.jpg",
        "d.tif",
    ]
    assert report.skipped["links that lead back"][0] == 1


def test_a_link_to_itself_stops_no_walk(tree):
    (tree / "loop.png").symlink_to("loop.png")
    report = WalkReport()
    assert names(walk(tree, report), tree) == ["a.png", "b.png", "x/c.jpg", "x/y/d.tif"]
    (reason,) = [
        reason for reason in report.skipped if reason.startswith("links that lead nowhere")
    ]
    assert report.skipped[reason] == (1, tree / "loop.png")


def test_what_is_told_is_one_line_each(tree):
    for number in range(10):
        (tree / f"run\n{number}").mkdir()
        (tree / f"run\n{number}" / "config.json").write_text('{"format": "fastadapt-adapter"}')
        report = WalkReport()
        assert len(list(walk(tree, report))) == 4
        lines = report.lines()
        assert len(lines) == 1 + (number + 1 if number < MANY_RUNS else 1)
        assert all(line.isprintable() for line in lines)
    assert lines[1].startswith("left out: 10 folders that fastadapt wrote (first ")


def test_a_folder_that_nobody_may_enter_stops_no_walk(tree, monkeypatch):
    def refusing(function):
        def call(path, *args, **more):
            if "x/y" in os.fspath(path):
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
            return function(path, *args, **more)

        return call

    report = WalkReport()
    with monkeypatch.context() as patch:  # for root there is no such folder
        for name in ("stat", "scandir"):
            patch.setattr(os, name, refusing(getattr(os, name)))
        found = list(walk(tree, report))
    assert names(found, tree) == ["a.png", "b.png", "x/c.jpg"]
    assert report.skipped["unreadable folders (Permission denied)"] == (1, tree / "x" / "y")
    assert report.unreadable_folders == 1


def test_what_is_no_file_is_told(tree):
    os.mkfifo(tree / "pipe.png")
    (tree / "gone.png").symlink_to("nowhere")
    for source in (tree, tree / "*"):
        report = WalkReport()
        assert {"a.png", "b.png"} <= set(names(walk(str(source), report), tree))
        assert report.skipped["links that lead nowhere"] == (1, tree / "gone.png")
        assert f"1 pipe, socket or device ({tree}/pipe.png)" in report.lines()[0]
    with pytest.raises(InputError, match=r"pipe\.png is a pipe, a socket or a device; expected"):
        list(walk(tree / "pipe.png"))
