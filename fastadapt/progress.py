"""Show progress on the terminal, and do work ahead of need."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
R = TypeVar("R")


class _Speed(ProgressColumn):
    """Show ``123 images/s``, after the task's field ``unit``."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f} {task.fields.get('unit', 'items')}/s")


def progress_bars(quiet: bool = False) -> Progress:
    """Show bars on stderr with speed and time left; nothing moves unless it is a terminal.

    ``progress.console`` is for lines that stay.
    """
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, markup=False)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
    )


def prefetch(
    function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int
) -> Iterator[R]:
    """Map in threads, in order, at most ``ahead`` results before they are asked for.

    Threads are enough for images: Pillow decodes and resizes without Python's lock.
    """
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
