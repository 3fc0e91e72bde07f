"""Tell how much memory a process may still take."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path


def available_memory() -> int:
    """Return the bytes that this process may still take: free ones, within its group's limit."""
    available = math.inf
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, max(limit - used, 0))
    return int(available) if math.isfinite(available) else 4 << 30
