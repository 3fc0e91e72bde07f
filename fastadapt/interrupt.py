"""Answer Ctrl-C with one line and exit code 130, whatever the process is doing.

While a command starts it only imports: there, an exception would end in whatever an import was
doing, and libraries turn it into other errors or swallow it, so the process exits at once. Once a
command works, Ctrl-C is the usual KeyboardInterrupt, so that files are put in order.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

EXIT_CODE = 130
_came = False


def install() -> None:
    """Exit at once on Ctrl-C from now on, outside of :func:`working`."""
    signal.signal(signal.SIGINT, _exit_at_once)
    sys.unraisablehook = _report


@contextmanager
def working() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C inside, if :func:`install` was called."""
    if signal.getsignal(signal.SIGINT) is not _exit_at_once:
        yield
        return
    signal.signal(signal.SIGINT, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _exit_at_once)


def came() -> bool:
    """Return whether Ctrl-C was pressed while the command worked.

    An error that follows is its consequence: libraries turn KeyboardInterrupt into other errors.
    """
    return _came


def _exit_at_once(signum: int = 0, frame: Any = None) -> NoReturn:
    os.write(2, b"fastadapt: interrupted\n")
    os._exit(EXIT_CODE)


def _raise(signum: int, frame: Any) -> NoReturn:
    global _came
    _came = True
    raise KeyboardInterrupt


def _report(unraisable: Any) -> None:
    """Exit for a KeyboardInterrupt that Python would only print, from a destructor, say."""
    if _came:
        _exit_at_once()
    sys.__unraisablehook__(unraisable)
