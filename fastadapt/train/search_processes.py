"""Spread the trials of a search over processes, one for each device that is named.

All write to one journal. The first process hands out one trial at a time and so knows who has one:
the trial of a process that was killed is handed out again, and the number of trials that end is the
number that was asked for.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fastadapt.errors import InputError, how_it_ended
from fastadapt.host_memory import keep_freed_memory
from fastadapt.train.search_trials import Task, end_running, open_study, run_one

Say = Callable[[dict[str, Any]], None]


def run_trials(
    task: Task,
    count: int,
    devices: Sequence[torch.device],
    say: Say,
    tell: Callable[[str], None] = print,
) -> None:
    """Run trials, in as many processes as there are devices.

    Args:
        task: of the search.
        count: of the trials to run; fewer once the deadline has passed.
        devices: one for each process; with one, trials run in this process.
        say: called with each trial that ended, as :func:`run_one` returns it.
        tell: called with a line for each process that was lost.

    Raises:
        InputError: a process met an error, or all were lost.
    """
    if len(devices) == 1:
        if devices[0].type == "cpu":
            keep_freed_memory()
        study = open_study(task)
        features = {name: item.to(devices[0]) for name, item in task.features.items()}
        task = replace(task, features=features)
        for _ in range(count):
            if _is_over(task):
                break
            say(run_one(study, task))
        return
    # Processes take arrays.
    task = replace(task, features={k: item.stored() for k, item in task.features.items()})
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    processes = [_begin(task, number, device, threads) for number, device in enumerate(devices)]
    try:
        _hand_out(processes, task, count, say, tell)
    finally:
        for each in processes:
            each.process.terminate()
            each.process.join()
            each.connection.close()
    end_running(open_study(task))  # of processes that were lost


@dataclass(eq=False)
class _Process:
    process: BaseProcess
    connection: Connection
    busy: bool = False

    def end(self) -> str:
        """Wait for its end, and say how it came."""
        self.process.join()
        return how_it_ended(self.process.exitcode or 0)


def _hand_out(
    processes: Sequence[_Process],
    task: Task,
    count: int,
    say: Say,
    tell: Callable[[str], None],
) -> None:
    """Give every idle process a trial, until none is left and all have answered."""
    running = list(processes)
    while True:
        for each in running:
            if not each.busy and count and not _is_over(task):
                each.busy, count = True, count - 1
                _send(each.connection)
        busy = [each for each in running if each.busy]
        if not busy:
            return
        ready = wait([each.connection for each in busy])
        for each in [each for each in busy if each.connection in ready]:
            try:
                kind, value = each.connection.recv()
            except (EOFError, OSError):
                running.remove(each)
                count += 1
                how = each.end()
                if not running:
                    raise InputError(
                        f"a process of the search ended {how}, and no other is left, perhaps for "
                        "lack of memory: give fewer `jobs`; `resume=True` goes on with the trials "
                        "that ended"
                    ) from None
                tell(f"a process of the search ended {how}; the others do its trial again")
                continue
            if kind == "error":
                raise InputError(value)
            # Its next trial begins before this one is told of.
            each.busy = bool(count) and not _is_over(task)
            if each.busy:
                count -= 1
                _send(each.connection)
            say(value)


def _send(connection: Connection) -> None:
    with contextlib.suppress(OSError):  # the process is gone, which receiving says, too
        connection.send("go on")


def _is_over(task: Task) -> bool:
    return task.deadline is not None and time.time() > task.deadline


def _begin(task: Task, number: int, device: torch.device, threads: int) -> _Process:
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_work, args=(task, number, str(device), threads, theirs), daemon=True
    )
    process.start()
    theirs.close()
    return _Process(process, ours)


def _work(task: Task, number: int, device: str, threads: int, connection: Connection) -> None:
    """Run a trial for each message: what a process of the search does."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is the first process's alone, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(threads)
        place = torch.device(device)
        if place.type == "cpu":
            keep_freed_memory()
        features = {name: item.to(place) for name, item in task.features.items()}
        task = replace(task, features=features)
        study = open_study(task, number)
        while True:
            try:
                connection.recv()
            except (EOFError, OSError):
                return
            connection.send(("trial", run_one(study, task)))
    except Exception as error:
        said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        connection.send(("error", " ".join(said.split())))


def _end_with_parent() -> None:
    """End this process once the one that started it is gone: a resumed search counts anew."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
