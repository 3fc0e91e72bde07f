"""Account for the seconds of a run: what the user waited for, phase by phase."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

PHASES = ("start", "decode", "features", "stage1", "stage2", "validation", "probe", "saving")


class Phases:
    """Wall time by phase. A phase within another is taken out of that one.

    Args:
        age: seconds that had passed before, in phase ``start``.
    """

    def __init__(self, age: float = 0.0):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._stack = ["start"]
        self._since = time.perf_counter() - age

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time within for a phase."""
        self._switch()
        self._stack.append(name)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def to_dict(self) -> dict[str, float]:
        """Return the seconds of each phase, and ``total``."""
        self._switch()
        rounded = {name: round(value, 3) for name, value in self.seconds.items()}
        return {**rounded, "total": round(sum(self.seconds.values()), 3)}


def phase_table(seconds: dict[str, float]) -> Table:
    """Return the phases of a run for the terminal."""
    table = Table("phase", "seconds", "share", box=None, pad_edge=False)
    total = seconds["total"] or 1.0
    for name in (*PHASES, "total"):
        table.add_row(name, f"{seconds[name]:.2f}", f"{seconds[name] / total:.0%}")
    return table


def process_age() -> float:
    """Return the seconds since this process started; 0 where the system doesn't say."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine did
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return 0.0
