import json
import os
from pathlib import Path

import pytest

from fastadapt import output_place
from fastadapt.errors import InputError
from fastadapt.output_place import check_output

KINDS = ("folder", "replaced folder", "file")


@pytest.mark.parametrize("kind", KINDS)
def test_places_that_no_kind_can_have(tmp_path, kind):
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for path, says in {
        "/": "cannot be a run: choose the name of a folder as `out`|is a folder; expected a file",
        tmp_path / "lost": "lost is a link that leads nowhere",
        tmp_path / "round": "round is a link that leads nowhere",
        tmp_path / "file" / "out": "file is a file, so that nothing can be in it",
        tmp_path / ("x" * 250): "too long",
        tmp_path / "a\0b": r"a\\0b cannot be written: .*null",
        "/proc/fastadapt/out": "out cannot be written: /proc",
    }.items():
        before = sorted(tmp_path.iterdir())
        with pytest.raises(InputError, match=says) as caught:
            check_output(path, kind, "a run")
        assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


def test_files_and_folders_are_told_apart(tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for kind in KINDS[:2]:
        with pytest.raises(InputError, match="file is a file; expected a folder"):
            check_output(tmp_path / "file", kind)
    with pytest.raises(InputError, match="is a folder; expected a file"):
        check_output(tmp_path, "file")
    with pytest.raises(InputError, match="pipe is no ordinary file"):
        check_output(tmp_path / "pipe", "file")
    assert check_output(tmp_path / "file", "file") == tmp_path / "file"


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_is_followed_and_kept(tmp_path, kind):
    target = tmp_path / "disk"
    target.touch() if kind == "file" else target.mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert check_output(tmp_path / "out", kind) == target
    assert (tmp_path / "out").is_symlink()


def test_bundles_and_runs_stay_what_they_are(tmp_path):
    bundle, run = tmp_path / "bundle", tmp_path / "run"
    for folder, name, what in ((bundle, "manifest", "bundle"), (run, "config", "adapter")):
        (folder / "sub").mkdir(parents=True)
        (folder / f"{name}.json").write_text(json.dumps({"format": f"fastadapt-{what}"}))
    (tmp_path / "link").symlink_to(bundle / "sub")
    for path, kinds in {
        bundle / "p.csv": KINDS,
        bundle / "sub" / "deep" / "out": KINDS,
        tmp_path / "link" / "out": KINDS,
        bundle: KINDS[:1],
    }.items():
        for kind in kinds:
            with pytest.raises(
                InputError, match=r"(is a bundle|in the bundle .*bundle), .* `json`"
            ):
                check_output(path, kind, option="json")
    assert check_output(bundle, "replaced folder") == bundle
    with pytest.raises(InputError, match=r"predictions.csv is the name of a file of the run"):
        check_output(run / "predictions.csv", "file")
    assert check_output(run / "mine.csv", "file") == run / "mine.csv"
    assert check_output(tmp_path / "predictions.csv", "file") == tmp_path / "predictions.csv"
    for kind in KINDS[:2]:
        assert check_output(run / "bundle", kind) == run / "bundle"


def test_mount_points_are_written_into_but_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(output_place, "mount_points", lambda: {str(tmp_path.resolve())})
    assert check_output(tmp_path, "folder") == tmp_path
    with pytest.raises(InputError, match="is a mount point, which cannot be replaced by a bundle"):
        check_output(tmp_path, "replaced folder", "a bundle")


def test_mount_points_are_read_from_the_system(monkeypatch):
    if not Path("/proc/self/mountinfo").exists():
        pytest.skip("the system does not tell")
    assert "/proc" in output_place.mount_points()
    lines = "1 2 0:3 / /mnt/my\\040disk rw - ext4 /dev/x rw\n"
    monkeypatch.setattr(output_place.Path, "read_text", lambda *args, **kwargs: lines)
    assert output_place.mount_points() == {"/mnt/my disk"}


def test_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert check_output(".", "folder") == Path()
    assert check_output(".", "replaced folder") == tmp_path / "here"  # empty
    Path("mine").touch()
    assert check_output(".", "folder") == Path()
    for place in (".", "..", tmp_path):
        with pytest.raises(InputError, match="holds the folder that this command runs in"):
            check_output(place, "replaced folder")


def test_a_read_only_place(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(output_place.tempfile, "TemporaryFile", refuse)
    for kind in KINDS:
        with pytest.raises(InputError, match=r"out cannot be written: .*: Read-only file system"):
            check_output(tmp_path / "deep" / "out", kind)
