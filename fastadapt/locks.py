"""Keep a second process from writing to the same place.

A lock is a file on which ``flock`` holds a lock. It ends with the process, however that ends, so
that a file which a killed process left does no harm; the next one takes and removes it. Where the
system or the file system has no such locks (Windows, some network mounts) nothing is refused.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fastadapt.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".fastadapt.lock"  # in a folder that is written into


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is written into; make the folder if need be.

    Folders that were made for it and into which nothing was put are removed at the end.

    Raises:
        InputError: another process holds it.
    """
    with _made(folder), _held(folder / LOCK, folder):
        yield


@contextlib.contextmanager
def lock_beside(target: Path) -> Iterator[None]:
    """Hold the lock of a file or folder that is replaced as a whole; the lock lies beside it.

    Raises:
        InputError: another process holds it.
    """
    with _made(target.parent), _held(lock_of(target), target):
        yield


def lock_of(target: Path) -> Path:
    """Return the lock's file beside what is replaced as a whole."""
    return target.with_name(f".{target.name}.lock")


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder; remove what was made at the end, as far as it is empty."""
    made = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Mark a folder as in use, without a file; wait while another process does."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network's file system may have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_in_use(folder: Path) -> bool:
    """Tell whether a running process marked the folder; true where that cannot be told."""
    if fcntl is None:
        return True
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


class FileLock:
    """A lock on a file that processes of one job wait for; it ends with its process.

    Args:
        file: to lock; made if it is not there.

    Raises:
        OSError: there are no such locks here.
    """

    def __init__(self, file: Path):
        if fcntl is None:
            raise OSError(errno.ENOLCK, "no locks")
        self._file = file.open("ab")
        self.acquire()  # a file system may have none
        self.release()

    def acquire(self) -> bool:
        """Wait for the lock, and hold it."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Let others have the lock."""
        fcntl.flock(self._file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _held(file: Path, target: Path) -> Iterator[None]:
    handle = _acquire(file, target)
    try:
        yield
    finally:
        if handle is not None:
            file.unlink(missing_ok=True)  # while it is held: nobody else holds this file
            os.close(handle)


def _acquire(file: Path, target: Path) -> int | None:
    """Return the handle of the locked file; None where there are no locks."""
    if fcntl is None:
        return None
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise InputError(f"{file} is a link; a lock is a file: remove the link") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(file, handle):
                said = f"process {os.getpid()} on {socket.gethostname()}"
                os.truncate(handle, 0)
                os.write(handle, said.encode())
                return handle
            os.close(handle)  # whoever held it has removed the file meanwhile
        except OSError as error:
            held = error.errno in (errno.EAGAIN, errno.EACCES)
            holder = _holder(handle) if held else ""
            os.close(handle)
            if held:
                raise InputError(
                    f"{target} is being written by {holder}: wait until it has ended, or give "
                    "another `out`"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            file.unlink(missing_ok=True)
            return None


def _is_still(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    return os.pread(handle, 200, 0).decode(errors="replace") or "another process"
