"""Connect the processes that ``torchrun`` started: NCCL between GPUs, gloo between CPUs.

Ctrl-C reaches each process by itself, and a process that simply stopped would leave the others
waiting in a sum that never ends. So it only raises a flag, which travels with the next exchange or
with a step's sums: all processes see it at the same place and raise KeyboardInterrupt there.

Where a process is gone, the sums of the others fail (gloo) or never end (NCCL), and torchrun sends
them SIGTERM. That raises the same flag; a process that is stuck saves its state from a thread.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastadapt.errors import InputError
from fastadapt.interrupt import EXIT_CODE
from fastadapt.processes import (
    Place,
    Processes,
    Share,
    end_silently,
    note_connected,
    place_from_environment,
    share_of,
)
from fastadapt.train.gradient_sum import GradientSum

T = TypeVar("T")
# How long a process may be ahead of another: it decodes, or reads weights over a network.
PATIENCE = timedelta(hours=1)
# Of Ctrl-C, torchrun passes on what the terminal has sent already: that is no second one.
AGAIN_SECONDS = 3.0
# After SIGTERM; torchrun kills after 30.
STUCK_SECONDS = 12.0
_FAILED = "fastadapt/failed"
LOST = "another process of this training has ended: continue with"


class Torchrun(Processes):
    """The connected processes of a job, seen from one of them.

    Args:
        place: of this process.
        device: that it computes on.
    """

    def __init__(self, place: Place, device: torch.device):
        self.place = place
        self.device = device
        # Objects travel between hosts' memories, so that no GPU is waited for.
        host, world = dist.new_group(backend="gloo", timeout=PATIENCE), dist.group.WORLD
        assert isinstance(host, dist.ProcessGroup) and world is not None
        self._host, self._group = host, world
        self._stop_at: float | None = None
        self._sums: GradientSum | None = None
        self._rescue: Callable[[], object] = lambda: None

    def share(self, order: Any, batch_size: int) -> Share:
        """Return this process's part of every batch."""
        return share_of(order, batch_size, self.place.rank, self.place.size)

    def gather(self, value: T) -> list[T]:
        """Return what each process gave, by rank.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed in one of them.
        """
        found: list[Any] = [None] * self.place.size
        dist.all_gather_object(found, (self._stop_at is not None, value), group=self._host)
        if any(stop for stop, _ in found):
            raise KeyboardInterrupt
        return [value for _, value in found]

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first process; all return what it returns, or raise its error."""
        result: T | None = None
        error: Exception | None = None
        if self.first:
            try:
                result = function()
            except Exception as problem:
                error = problem
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows of all processes, one after the other."""
        most = max(counts)
        sent = rows.new_zeros(most, *rows.shape[1:])
        mine = counts[self.place.rank]
        sent[:mine] = rows[:mine]
        found = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(found, sent, group=self._group)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        for tensor in tensors:
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0, group=self._group)
            tensor.detach().copy_(value)

    def gradient_sum(self, model: nn.Module) -> GradientSum:
        """Return what adds up the gradients of all processes, in place of an earlier one."""
        if self._sums is not None:
            self._sums.close()
        self._sums = GradientSum(model, self._group)
        return self._sums

    def before_step(self) -> None:
        """Tell the other processes of Ctrl-C with the sums of the next step."""
        if self._stop_at is not None and self._sums is not None:
            self._sums.stop.fill_(1)

    def after_reading(self) -> None:
        """Raise KeyboardInterrupt if any process told of Ctrl-C with the last step."""
        if self._sums is not None and self._sums.asked_to_stop:
            raise KeyboardInterrupt

    def interrupt(self, again: bool = True) -> None:
        """Note that training shall end; with ``again``, some seconds later, end at once."""
        if self._stop_at is None:
            self._stop_at = time.monotonic()
        elif again and time.monotonic() - self._stop_at > AGAIN_SECONDS:
            os._exit(EXIT_CODE)

    def if_stuck(self, function: Callable[[], object]) -> None:
        """Have a function called, in a thread, if this process waits for one that is gone."""
        self._rescue = function

    def end_stuck(self) -> None:
        """End this process, whose main thread waits for another one, from a thread."""
        try:
            if self.first:
                if self.device.type == "cuda":  # the usual stream is stuck, too
                    with torch.cuda.stream(torch.cuda.Stream(self.device)):
                        self._rescue()
                else:
                    self._rescue()
                os.write(2, f"fastadapt: {LOST} --resume\n".encode())
        finally:
            os._exit(1)

    def is_first_to_fail(self) -> bool:
        """Whether no other process has failed before this one; it is the one to say why."""
        try:
            store = dist.distributed_c10d._get_default_store()
            return int(store.add(_FAILED, 1)) == 1
        except RuntimeError:  # whoever kept the count is gone
            return self.first

    def close(self) -> None:
        """Disconnect."""
        if self._sums is not None:
            self._sums.close()
            self._sums = None
        gc.collect()  # NCCL waits for graphs that hold its kernels
        dist.destroy_process_group()


@contextmanager
def connected(device: torch.device) -> Iterator[Processes]:
    """Connect the processes of this job inside the context.

    Of an error that several processes meet, the first to fail raises it, and the others end
    silently: :class:`SystemExit`.

    Args:
        device: of this process.

    Raises:
        InputError: another process is gone.
    """
    place = place_from_environment()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, timeout=PATIENCE, device_id=device if device.type == "cuda" else None
    )
    processes = Torchrun(place, device)
    note_connected()
    try:
        with _signals(processes):
            yield processes
    except KeyboardInterrupt:
        if not processes.first:
            end_silently(EXIT_CODE)
        _ignore_sigterm()
        raise
    except Exception as error:
        if not processes.is_first_to_fail():
            end_silently(1)
        _ignore_sigterm()
        if _is_of_connection(error):
            raise InputError(f"{LOST} `resume=True`") from None
        raise
    processes.close()


def _ignore_sigterm() -> None:
    """Let this process, which is about to end, say why: torchrun ends all once one has ended."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _signals(processes: Torchrun) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a flag that all processes see; end this one if it is stuck."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: object) -> None:
        processes.interrupt(again=number == signal.SIGINT)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    over = threading.Event()

    def watch() -> None:
        # A main thread that waits for a GPU runs no handler; the signal's number comes here.
        while numbers := os.read(reading, 1):
            if numbers[0] == signal.SIGTERM and not over.wait(STUCK_SECONDS):
                processes.end_stuck()

    watcher = threading.Thread(target=watch, name="fastadapt waits for signals", daemon=True)
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _is_of_connection(error: Exception) -> bool:
    """Whether an error comes from the connection: another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(
        word in str(error) for word in ("gloo", "NCCL", "Connection", "TCPStore")
    )
