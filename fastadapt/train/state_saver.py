"""Save the state of a run beside the training, at most every few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fastadapt.train.run_folder import State


class StateSaver:
    """Write the newest state that was offered, in a thread of its own.

    A state is whole on disk or not there. A kill loses the epochs after the last one that was
    written; whatever ends a run otherwise (Ctrl-C, a full GPU, an error) writes the newest first.

    Args:
        write: writes a state; called in the thread, one call after the other.
        every: least seconds between the beginnings of two writes; with 0 each state is written
            before :meth:`offer` returns.
    """

    def __init__(self, write: Callable[[State], object], every: float):
        self._write = write
        self._every = every
        self._begun = time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._newest: State | None = None  # not yet written

    def offer(self, state: State) -> None:
        """Take a state whose tensors nobody will change.

        Raises:
            Exception: what an earlier write raised.
        """
        self._newest = state
        if self._every <= 0:
            self.flush()
        elif time.monotonic() - self._begun >= self._every and not self._busy():
            self._begin()

    def flush(self) -> None:
        """Wait until the newest state is written.

        Raises:
            Exception: what a write raised.
        """
        if self._thread is not None:
            self._thread.join()
        self._raise()
        if self._newest is not None:
            state, self._newest = self._newest, None
            self._write(state)

    def drop(self) -> None:
        """Forget the newest state: the run is complete, and its results take its place."""
        self._newest = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _begin(self) -> None:
        self._raise()
        state, self._newest = self._newest, None
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(state,), name="fastadapt saves")
        self._thread.start()

    def _run(self, state: State) -> None:
        try:
            self._write(state)
        except BaseException as error:
            self._error = error

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
