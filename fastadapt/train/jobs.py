"""Run independent jobs beside each other, one process each, on the devices of this machine.

A job is a call of a function that can be pickled. A cached run is too small for two GPUs, so that
folds, seeds and trials are spread instead. Jobs that are finished say so themselves: a function
that is called again with the same arguments leaves finished work as it is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from fastadapt.errors import InputError, how_it_ended
from fastadapt.processes import VARIABLES, VISIBLE, visible_name

PATIENCE = 30.0  # seconds for a process to save its state once another one has failed


@dataclass(frozen=True)
class Job:
    """One call.

    Attributes:
        name: for messages.
        arguments: of the function, by name, beside ``device``.
    """

    name: str
    arguments: dict[str, Any]


def run_jobs(
    function: Callable[..., Any],
    jobs: Sequence[Job],
    devices: Sequence[str],
    done: Callable[[Job, Any], object] = lambda job, result: None,
) -> list[Any]:
    """Call a function for each job, in processes, at most one at a time on each device.

    Args:
        function: of a module, called with a job's arguments and ``device``.
        jobs: in the order in which they begin.
        devices: ``"cuda:0"``, …, ``"cpu"``; one that stands there twice has two processes.
        done: called with each job that is finished, and what it returned.

    Returns:
        What the calls returned, in the order of the jobs.

    Raises:
        InputError: a job failed; the others were ended, and have saved their state.
        KeyboardInterrupt: after all processes have ended.
    """
    waiting = deque(enumerate(jobs))
    free = list(devices)
    running: dict[Connection, _Running] = {}
    results: list[Any] = [None] * len(jobs)
    try:
        while waiting or running:
            while waiting and free:
                index, job = waiting.popleft()
                begun = _begin(function, job, index, free.pop(0))
                running[begun.connection] = begun
            for connection in wait(list(running)):
                ended = running.pop(connection)  # type: ignore[call-overload]
                results[ended.index] = ended.result()
                free.append(ended.device)
                done(ended.job, results[ended.index])
    except BaseException:
        _end(list(running.values()))
        raise
    return results


@dataclass
class _Running:
    job: Job
    index: int
    device: str
    process: BaseProcess
    connection: Connection

    def result(self) -> Any:
        """Return what the call returned, or raise why there is nothing."""
        try:
            kind, value = self.connection.recv()
        except EOFError:
            kind, value = None, None
        self.process.join()
        self.connection.close()
        if kind == "result":
            return value
        if kind == "error":
            raise InputError(f"{self.job.name}: {value}")
        how = how_it_ended(self.process.exitcode or 0)
        raise InputError(
            f"{self.job.name}: its process ended {how}, perhaps for lack of memory: use fewer "
            "`devices`, and continue with `resume=True`"
        )


def _begin(function: Callable[..., Any], job: Job, index: int, device: str) -> _Running:
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_call, args=(function, job.arguments, device, theirs), name=job.name
    )
    process.start()
    theirs.close()
    return _Running(job, index, device, process, ours)


def _end(running: Sequence[_Running]) -> None:
    """Interrupt processes, which save their state, and wait for them."""
    for each in running:
        if each.process.pid is not None:
            try:
                os.kill(each.process.pid, signal.SIGINT)
            except ProcessLookupError:
                continue
    for each in running:
        each.process.join(PATIENCE)
        if each.process.is_alive():
            each.process.kill()
            each.process.join()


def _call(
    function: Callable[..., Any], arguments: dict[str, Any], device: str, connection: Connection
) -> None:
    """Call the function in a process of its own, and send what it returns."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is the first process's alone, which passes it on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in VARIABLES:
        os.environ.pop(name, None)
    if device.startswith("cuda:"):
        os.environ[VISIBLE] = visible_name(int(device.removeprefix("cuda:")))
        device = "cuda:0"
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    try:
        message = ("result", function(**arguments, device=device))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        message = ("error", " ".join(said.split()))
    connection.send(message)


def _end_with(connection: Connection) -> None:
    """End this process once the one that started it is gone."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
