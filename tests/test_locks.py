import subprocess
import sys

import pytest

from fastadapt import locks
from fastadapt.errors import InputError

HOLD = """
import sys, pathlib
from fastadapt import locks
with getattr(locks, sys.argv[1])(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("name", "lock"), [("lock_folder", "out/.fastadapt.lock"), ("lock_beside", ".out.lock")]
)
def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path, name, lock):
    target, hold = tmp_path / "out", getattr(locks, name)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, name, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=rf"out is being written by process {first.pid} on .*"),
            hold(target),
        ):
            pass
        assert (tmp_path / lock).is_file()
        first.kill()
        first.wait()
        assert (tmp_path / lock).is_file()  # which hinders nobody
        with hold(target):
            assert (tmp_path / lock).is_file()
        assert not (tmp_path / lock).exists()
    finally:
        first.kill()
        first.communicate()


def test_the_same_process_is_refused_too_and_what_was_made_for_it_goes(tmp_path):
    target = tmp_path / "a" / "b"
    with locks.lock_folder(target):
        with pytest.raises(InputError, match="is being written"), locks.lock_folder(target):
            pass
        assert list(target.iterdir()) == [target / locks.LOCK]
    assert not (tmp_path / "a").exists()
    with locks.lock_beside(target):
        (tmp_path / "a" / "mine").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_without_locks_nothing_is_refused(tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with locks.lock_folder(tmp_path), locks.lock_folder(tmp_path):
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(locks, "fcntl", None)
    with locks.lock_folder(tmp_path), locks.lock_folder(tmp_path):
        assert locks.is_in_use(tmp_path)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / locks.LOCK).symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(InputError, match="is a link"), locks.lock_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "mine"
