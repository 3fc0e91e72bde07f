"""Run the command line in a fork of a process that has imported everything, and kill it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

POINTS = ("replace", "rename", "fsync", "unlink", "mkdir", "rmdir")
LONGEST = 900  # seconds of a command, on a busy machine


class Kill(NamedTuple):
    """When a command is killed: at a share of its time, or at a file operation."""

    share: float | None = None
    operation: int | None = None
    after: bool = False


class Ended(NamedTuple):
    """How a command ended: its exit status, seconds, file operations, and what it said."""

    status: int
    seconds: float
    operations: list[str]
    said: str


def run(arguments: list[Any], kill: Kill | None = None, seconds: float = 0.0) -> Ended:
    """Run the command line in a fork of this process, and kill it.

    Args:
        arguments: of the command line.
        kill: when; never if ``None``.
        seconds: that the command takes, of which ``kill.share`` is a part.
    """
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        said, noted = Path(folder) / "said", Path(folder) / "operations"
        start = time.monotonic()
        process = os.fork()
        if process == 0:
            _be_the_command(arguments, kill, said, noted)
        os.setpgid(process, process)
        if kill is not None and kill.share is not None:
            end = start + kill.share * seconds
            while time.monotonic() < end and _status(process) is None:
                time.sleep(0.002)
            if process not in _ENDED:
                os.kill(process, signal.SIGKILL)
        while _status(process) is None:
            time.sleep(0.002)
            if time.monotonic() > start + LONGEST:
                os.killpg(process, signal.SIGKILL)
        took = time.monotonic() - start
        time.sleep(0.05)
        # Processes that decode end with the one that started them; if not, now.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)
        operations = noted.read_text().splitlines() if noted.exists() else []
        words = said.read_text(errors="replace") if said.exists() else ""
        return Ended(_ENDED.pop(process), took, operations, words)


_ENDED: dict[int, int] = {}


def _status(process: int) -> int | None:
    if process not in _ENDED:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            _ENDED[process] = os.waitstatus_to_exitcode(status)
    return _ENDED.get(process)


def _be_the_command(arguments: list[Any], kill: Kill | None, said: Path, noted: Path) -> None:
    """Run a command and end the process; file operations are noted, and one may be the last."""
    status = 70
    try:
        os.setpgid(0, 0)
        output = os.open(said, os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        _watch_files(kill, noted)
        sys.argv = ["fastadapt", *map(str, arguments)]
        from fastadapt import cli

        cli.main()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch_files(kill: Kill | None, noted: Path) -> None:
    """Put watchers around the functions by which files come, go and change their names."""
    from fastadapt import files

    notes, process, count = noted.open("w"), os.getpid(), 0

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if os.getpid() != process:
                return function(*args, **kwargs)
            number, count = count, count + 1
            mine = kill is not None and kill.operation == number
            notes.write(f"{name} {Path(str(args[0])).name}\n")
            notes.flush()
            if mine and not kill.after:
                os.kill(process, signal.SIGKILL)
            result = function(*args, **kwargs)
            if mine:
                os.kill(process, signal.SIGKILL)
            return result

        return watch

    for name in POINTS:
        setattr(os, name, watched(name, getattr(os, name)))
    original = files.exchange
    for module in list(sys.modules.values()):
        if getattr(module, "exchange", None) is original:
            module.exchange = watched("exchange", original)
