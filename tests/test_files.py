import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from fastadapt import files
from fastadapt.errors import InputError


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "result.txt"
    files.write_text(target, "old")
    with pytest.raises(RuntimeError), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_an_os_error_and_leaves_no_debris(tmp_path, monkeypatch, number):
    def full(*args, **kwargs):
        raise files_error

    import safetensors.torch

    said = f"{os.strerror(number)} (os error {number})"
    files_error = Exception(f"Error while serializing: I/O error: {said}")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        files.write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert caught.value.errno == number
    assert not list(tmp_path.iterdir())
    # A write does not say to which file; the error does.
    with pytest.raises(OSError) as caught, files.atomic_path(tmp_path / "b.json"):
        raise OSError(number, os.strerror(number))
    assert caught.value.filename == str(tmp_path / "b.json")


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path):
    target = tmp_path / "result.txt"
    files.write_text(target, "old")
    code = (
        "import os, sys; from fastadapt import files\n"
        "with files.atomic_path(sys.argv[1]) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_results_are_as_readable_as_other_files(tmp_path):
    files.write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_tensors_round_trip_whatever_their_strides(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    files.write_tensors(tmp_path / "t", {"a": base.t(), "b": base[1:]}, {"note": "x"})
    tensors, metadata = files.read_tensors(tmp_path / "t")
    assert torch.equal(tensors["a"], base.t()) and torch.equal(tensors["b"], base[1:])
    assert metadata == {"note": "x"}


@pytest.mark.parametrize(
    ("content", "says"), [("{", "no valid JSON"), ("[1]", "expected an object")]
)
def test_bad_json(tmp_path, content, says):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match=says):
        files.read_json(tmp_path / "c.json")
    with pytest.raises(InputError, match="does not exist"):
        files.read_json(tmp_path / "d.json")


def test_hash_depends_on_values_names_and_shapes_only(tmp_path):
    a = {"x": torch.arange(6.0).view(2, 3), "y": torch.zeros(2, dtype=torch.bfloat16)}
    same = {"y": a["y"].clone(), "x": torch.arange(6.0).view(3, 2).t().contiguous().view(2, 3)}
    same["x"] = torch.arange(6.0).view(2, 3).t().contiguous().t()
    assert files.sha256_tensors(a) == files.sha256_tensors(same)
    assert files.sha256_tensors(a) != files.sha256_tensors(a | {"x": a["x"].view(3, 2)})
    assert files.sha256_tensors(a) != files.sha256_tensors({"z": a["x"], "y": a["y"]})


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"],
)
def test_text_of_any_program(tmp_path, encoding):
    file = tmp_path / "classes.txt"
    file.write_bytes("Katze\r\n\r\n  Größe 5 µm \r\nChien d’été".encode(encoding))
    assert files.read_lines(file) == ["Katze", "Größe 5 µm", "Chien d’été"]


@pytest.mark.parametrize(
    "content", [b"\x00\x01path", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"a\0\0\0b"]
)
def test_what_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(InputError, match="UTF-8"):
        files.read_text(tmp_path / "classes.txt")
    with pytest.raises(InputError, match="does not exist"):
        files.read_text(tmp_path / "gone.txt")


def test_json_holds_names_that_are_no_text(tmp_path):
    for value in ({"name": os.fsdecode(b"gr\xe4u.png")}, {"name": "gräu"}):
        files.write_json(tmp_path / "a.json", value)
        (tmp_path / "a.json").read_text(encoding="utf-8")
        assert files.read_json(tmp_path / "a.json") == value


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.json").write_bytes('\ufeff{"a": 1}'.encode())
    assert files.read_json(tmp_path / "c.json") == {"a": 1}


def test_two_folders_exchange_their_names_in_one_step_or_not_at_all(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if files.exchange(tmp_path / "a", tmp_path / "b"):  # Linux, on most file systems
        assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
        assert [p.name for p in (tmp_path / "b").iterdir()] == ["a"]
    before = sorted(tmp_path.rglob("*"))
    assert not files.exchange(tmp_path / "a", tmp_path / "gone")
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: object())
    assert not files.exchange(tmp_path / "a", tmp_path / "b")
    assert sorted(tmp_path.rglob("*")) == before


def test_temporary_names_are_told_from_others():
    for name, ours in {
        ".a.json.abcd_123.tmp": True,
        ".b.json.abcd1234.tmp": False,
        ".a.json.tmp": False,
        "a.json.abcd1234.tmp": False,
        ".a.json.ABCD1234.tmp": False,
    }.items():
        assert files.is_temporary(name, {"a.json"}) == ours


@pytest.mark.parametrize("read", [files.read_json, files.read_text, files.read_tensors])
def test_what_cannot_be_read_is_one_line(tmp_path, read):
    with pytest.raises(InputError, match="is a folder; expected a file"):
        read(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "gone")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_json_that_is_too_deep_or_too_long(tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match="no valid JSON"):
        files.read_json(tmp_path / "c.json")
