"""Import what the end of a run needs while its last stage trains."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Sequence

OUTPUTS = ("sklearn.metrics", "fastadapt.train.plots", "fastadapt.train.mistakes")
SWITCH_INTERVAL = 1e-4  # seconds


def import_ahead(modules: Sequence[str] = OUTPUTS) -> threading.Thread | None:
    """Import modules in a thread; return it, or ``None`` where all are loaded.

    A thread that launches GPU work gets Python's lock back after a tenth of a millisecond
    meanwhile, where Python would let an importing thread have it for five.
    """
    if all(name in sys.modules for name in modules):
        return None
    thread = threading.Thread(
        target=_import, args=(modules,), name="fastadapt imports", daemon=True
    )
    thread.start()
    return thread


def _import(modules: Sequence[str]) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        for name in modules:
            with contextlib.suppress(Exception):  # told where the module is needed
                importlib.import_module(name)
    finally:
        sys.setswitchinterval(interval)
