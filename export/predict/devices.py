"""Spread the parts of a job over several devices, one process each.

This process lists the images and hands out parts, a few ahead of need; each process decodes with
its share of the cores, computes, and writes its parts itself. The file that is joined of them is
that of one device. Parts of a process that ends before its time go to the others.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from fastadapt.data.decode_pool import default_workers
from fastadapt.device_list import expand_devices
from fastadapt.errors import InputError, how_it_ended
from fastadapt.processes import VISIBLE, visible_name

from .decode_ahead import images_ahead
from .device_worker import Assignment
from .models import ImageModel
from .part_maker import Todo, part_size
from .parts import KEPT
from .request import Request
from .settings import WorkSettings
from .sources import Item

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from fastadapt.export.predict.device_worker import main; main(int(sys.argv[2]))"
)


@dataclass
class _Process:
    """A process, and the parts that it has to do."""

    device: str
    child: subprocess.Popen
    connection: Connection
    parts: dict[int, list[Item]] = field(default_factory=dict)
    waits: bool = False  # it was told that there are no more parts for now


class DevicePool:
    """Processes that compute parts; a context manager.

    Args:
        request: the model and the columns.
        work: devices, batch, workers and the file of the results.

    Attributes:
        model: what all of them loaded, without its function.

    Raises:
        InputError: a device is not there, or the model does not load; or the devices would compute
            with different runtimes.
    """

    def __init__(self, request: Request, work: WorkSettings):
        devices = expand_devices(work.devices or "all")
        self._size = part_size(work.batch)
        self._running: list[_Process] = []
        total = default_workers() if work.workers is None else work.workers
        shares = [total // len(devices) + (i < total % len(devices)) for i in range(len(devices))]
        self._ahead = images_ahead(work.batch, max(shares))
        try:
            for device, share in zip(devices, shares, strict=True):
                environment, seen = _environment(device)
                given = Assignment(
                    request, seen, work.out, work.batch, self._size, max(share, 1), work.decode
                )
                self._running.append(_start(device, environment, given))
            models = [self._loaded(process) for process in self._running]
        except BaseException:
            self.close()
            raise
        self.model: ImageModel = models[0]
        for device, model in zip(devices, models, strict=True):
            if model.identity != self.model.identity:
                self.close()
                raise InputError(
                    f"{devices[0]} computes with {self.model.name} and {device} with "
                    f"{model.name}: name devices of one kind as `devices`"
                )

    def __enter__(self) -> DevicePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The process ids."""
        return [process.child.pid for process in self._running]

    def close(self) -> None:
        """End the processes."""
        for process in self._running:
            process.connection.close()
            process.child.terminate()
        for process in self._running:
            process.child.wait()
        self._running = []

    def _loaded(self, process: _Process) -> ImageModel:
        try:
            kind, value = process.connection.recv()
        except (EOFError, OSError):
            raise InputError(f"the process for {process.device} {_end(process)}") from None
        if kind != "model":
            raise InputError(value)
        return value

    def run(self, todo: Todo, advance: Callable[[int], Any]) -> None:
        """Compute all parts.

        Args:
            todo: the parts; taken a few at a time.
            advance: called with the number of images of each batch.

        Raises:
            InputError: every process ended, or one says that the work cannot be done.
        """
        source, again = iter(todo), list[tuple[int, list[Item]]]()
        # A decoder asks for batches ahead: with fewer images at hand it would wait for ever.
        enough = self._size + self._ahead
        while True:
            for process in self._running:
                self._fill(process, source, again, enough)
            if not any(process.parts for process in self._running):
                return
            ready: Sequence[Any] = wait([p.connection for p in self._running])
            for process in [p for p in self._running if p.connection in ready]:
                try:
                    kind, *values = process.connection.recv()
                except (EOFError, OSError):
                    again += self._lost(process)
                    continue
                if kind == "error":
                    raise InputError(values[0])
                if kind == "system":
                    raise InputError(f"{values[0]}; {KEPT}")
                images, finished = values
                advance(images)
                if finished is not None:
                    del process.parts[finished]

    def _fill(
        self,
        process: _Process,
        source: Iterator[tuple[int, Any]],
        again: list[tuple[int, list[Item]]],
        enough: int,
    ) -> None:
        """Send a process parts until it has enough, or there are none."""
        while sum(map(len, process.parts.values())) < enough:
            part = again.pop(0) if again else next(source, None)
            if part is None:
                if process.parts and not process.waits:
                    process.waits = True
                    self._send(process, None)
                return
            number, items = part[0], list(part[1])
            process.parts[number], process.waits = items, False
            self._send(process, (number, items))

    def _send(self, process: _Process, message: Any) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # receiving says so, too
            process.connection.send(message)

    def _lost(self, process: _Process) -> list[tuple[int, list[Item]]]:
        """Take a process that ended out; return the parts that it leaves."""
        self._running.remove(process)
        process.connection.close()
        how = _end(process)
        if not self._running:
            raise InputError(
                f"the process for {process.device} {how}, and no other is left: {KEPT}"
            )
        print(
            f"the process for {process.device} {how}; the others do its parts",
            file=sys.stderr,
        )
        return sorted(process.parts.items())


def _environment(device: str) -> tuple[dict[str, str], str]:
    """Return a process's environment, where its device is the only one, and the device's name."""
    environment = dict(os.environ)
    if device == "cpu":
        return environment, "cpu"
    environment[VISIBLE] = visible_name(int(device.partition(":")[2]))
    return environment, "cuda"


def _start(device: str, environment: dict[str, str], given: Assignment) -> _Process:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno())]
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=environment,
            start_new_session=True,  # Ctrl-C is this process's alone
        )
    connection = Connection(ours.detach())
    with suppress(BrokenPipeError, ConnectionResetError):  # receiving says so, too
        connection.send(given)
    return _Process(device, child, connection)


def _end(process: _Process) -> str:
    return f"ended {how_it_ended(process.child.wait())}"
