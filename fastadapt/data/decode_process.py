"""One process that decodes, as the process that asks it sees it, and what it has not answered.

Requests are answered in order, each to the part that it belongs to, whichever part is waited for:
a pass over images may be left early, and several may run at once, in threads, too. Ctrl-C may end
any of these steps, and a message that was cut off makes the connection useless. Then the process is
started again, and asked again for all that it has not answered.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

from fastadapt.errors import InputError, how_it_ended

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from fastadapt.data.decode_worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
_TO_END = 10.0  # seconds that a process has whose connection ended


class Part:
    """What was asked for at once, and what came back.

    Args:
        shares: for each process, by its number, the places of its images.

    Attributes:
        answers: by the places of images.
        waits: numbers of the processes that have not answered.
        error: why one of them never will.
    """

    def __init__(self, shares: dict[int, list[int]]):
        self.shares, self.waits = shares, set(shares)
        self.answers: dict[int, Any] = {}
        self.error: InputError | None = None

    @property
    def images(self) -> int:
        """The number of images."""
        return sum(map(len, self.shares.values()))


class _Asked(NamedTuple):
    part: Part
    request: tuple


class DecodeProcess:
    """A process that decodes.

    Args:
        number: of the process in its pool.
        memory_fd: the file whose memory it shares.
    """

    def __init__(self, number: int, memory_fd: int):
        self._number, self._memory_fd, self._parent = number, memory_fd, os.getpid()
        self._asked: deque[_Asked] = deque()  # what it has not answered
        self._lock = threading.Lock()
        self._cut = False  # whether a message may have been cut off
        self._child, self._connection = _started(memory_fd)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._child.pid

    def ask(self, part: Part, request: tuple) -> None:
        """Send a request, of this process's share of a part.

        Raises:
            InputError: the process has ended, or this one is a fork of the one that started it.
        """
        self._check_parent()
        with self._lock:
            self._mend()
            self._cut = True
            self._asked.append(_Asked(part, request))
            self._send(request)
            self._cut = False

    def wait_for(self, part: Part) -> None:
        """Wait for the answer to this process's share of a part; take what comes before it.

        Raises:
            InputError: as for :meth:`ask`.
        """
        self._check_parent()
        with self._lock:
            while self._number in part.waits and part.error is None:
                self._mend()
                self._cut = True
                try:
                    answers = self._connection.recv()
                except (EOFError, OSError):
                    self._fail()
                # In this order: what is cut off here is asked for again, not lost.
                answered = self._asked[0].part
                rows = answered.shares[self._number]
                answered.answers.update(zip(rows, answers, strict=True))
                answered.waits.discard(self._number)
                self._asked.popleft()
                self._cut = False
        if part.error is not None:
            raise part.error

    def stop(self) -> None:
        """Have the process end; :meth:`join` waits for it."""
        self._connection.close()
        self._child.terminate()

    def join(self) -> None:
        """Wait until the process has ended."""
        self._child.wait()

    def _check_parent(self) -> None:
        if os.getpid() != self._parent:
            raise InputError(
                "images are decoded by processes that were started before this one forked, and "
                "answer that one: start workers by multiprocessing's 'spawn', or make the loader "
                "or predictor in each"
            )

    def _send(self, request: tuple) -> None:
        try:
            self._connection.send(request)
        except (BrokenPipeError, ConnectionResetError):
            self._fail()

    def _mend(self) -> None:
        """Start the process again if a message may have been cut off."""
        if not self._cut:
            return
        self._connection.close()
        self._child.kill()
        self._child.wait()
        self._child, self._connection = _started(self._memory_fd)
        for asked in self._asked:
            self._send(asked.request)
        self._cut = False

    def _fail(self) -> NoReturn:
        """Say how the process ended to all that wait for it; the next request starts another."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(_TO_END)
        self._child.kill()  # which one that has ended does not notice
        how = how_it_ended(self._child.wait())
        error = InputError(
            f"a process that decodes images ended {how}, probably for lack of memory: "
            "use fewer workers"
        )
        for asked in self._asked:
            asked.part.error = error
        self._asked.clear()
        raise error


def _started(memory_fd: int) -> tuple[subprocess.Popen, Connection]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    ours, theirs = socket.socketpair()
    with theirs:
        fds = (theirs.fileno(), memory_fd)
        command = [sys.executable, "-c", _START, json.dumps(sys.path), *map(str, fds)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            env=environment,
            start_new_session=True,  # Ctrl-C is this process's alone
        )
    return child, Connection(ours.detach())
