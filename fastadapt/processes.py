"""Tell how a job is spread over processes: one, or several that ``torchrun`` started.

:class:`Processes` is a job of one process, whose methods give back what they get. Several
processes are :class:`fastadapt.train.distributed.Torchrun`, with the same methods; nothing of
``torch.distributed`` is used before there are several.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from fastadapt.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

T = TypeVar("T")
# All of them are set by torchrun. WORLD_SIZE and RANK alone may be those of machines.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

VISIBLE = "CUDA_VISIBLE_DEVICES"

HESITATION = 10.0  # seconds


def visible_name(index: int) -> str:
    """Return by which name ``VISIBLE`` shows a process the GPU that is number ``index`` here."""
    seen = [word for word in os.environ.get(VISIBLE, "").split(",") if word]
    return seen[index] if seen else str(index)


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of its job.

    Attributes:
        rank, size: its number, from 0, and how many there are.
        local_rank, local_size: the same on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def owns(self, path: str) -> bool:
        """Whether this process is the one that decodes an image, of all processes."""
        return zlib.crc32(path.encode()) % self.size == self.rank

    def owns_here(self, path: str) -> bool:
        """Whether this process is the one that decodes an image, of those on this machine."""
        return zlib.crc32(path.encode()) % self.local_size == self.local_rank


def place_from_environment() -> Place:
    """Return where ``torchrun`` put this process; a job of one process without it.

    Raises:
        InputError: the variables are no numbers, or cannot be.
    """
    if any(name not in os.environ for name in VARIABLES):
        return Place()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    # Other launchers may leave the last one out: then a process decodes for itself alone.
    given = [os.environ.get(name, "1" if name == names[3] else "") for name in names]
    try:
        rank, size, local_rank, local_size = map(int, given)
    except ValueError:
        rank = size = local_rank = local_size = -1
    if not (0 <= rank < size and local_rank >= 0 and 0 < local_size <= size):
        said = ", ".join(f"{name}={value}" for name, value in zip(names, given, strict=True))
        raise InputError(f"the environment says {said}: start several processes with torchrun")
    if local_rank >= local_size:
        local_rank, local_size = 0, 1
    return Place(rank, size, local_rank, local_size)


@dataclass(frozen=True)
class Share:
    """A process's part of an order of images that is cut into batches.

    Each batch is split into pieces of consecutive images, one for each process, that differ by
    one image at most. A process without images in a small last batch gets one all the same, the
    batch's first: it takes part in the step, and its result counts nowhere.

    Attributes:
        order: places of this process's images, batch after batch.
        batch_size: this process's images of a full batch.
        rows: for each batch, how many images of each process count.
        rank: of this process.
    """

    order: np.ndarray
    batch_size: int
    rows: tuple[tuple[int, ...], ...]
    rank: int = 0

    def images(self, index: int) -> int:
        """Return the images of a whole batch."""
        return sum(self.rows[index])

    def mine(self, index: int) -> int:
        """Return the images of a batch that count and are this process's."""
        return self.rows[index][self.rank]


def share_of(order: np.ndarray, batch_size: int, rank: int, size: int) -> Share:
    """Split every batch of an order over processes; see :class:`Share`."""
    import numpy as np

    pieces: list[np.ndarray] = []
    rows: list[tuple[int, ...]] = []
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        least, more = divmod(len(batch), size)
        # The first processes have one more: none has more than in a full batch.
        counts = tuple(least + (r < more) for r in range(size))
        first = sum(counts[:rank])
        rows.append(counts)
        pieces.append(batch[first : first + counts[rank]] if counts[rank] else batch[:1])
    least, more = divmod(min(batch_size, len(order)), size)
    own = max(least + (rank < more), 1)
    return Share(np.concatenate(pieces) if pieces else order[:0], own, tuple(rows), rank)


class Processes:
    """The processes of a job, seen from one of them: here, from the only one.

    Methods that exchange something must be called by all processes, in the same order.
    """

    place = Place()

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.place.rank == 0

    def share(self, order: np.ndarray, batch_size: int) -> Share:
        """Return this process's part of every batch."""
        rows = tuple(
            (min(batch_size, len(order) - start),) for start in range(0, len(order), batch_size)
        )
        return Share(order, batch_size, rows)

    def gather(self, value: T) -> list[T]:
        """Return what each process gave, by rank."""
        return [value]

    def all_true(self, value: bool) -> bool:
        """Return whether a condition holds in every process."""
        return all(self.gather(value))

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first process; all return what it returns, or raise its error."""
        return function()

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows of all processes, one after the other.

        Args:
            rows: [at least this process's count, ...].
            counts: how many rows of each process count.
        """
        return rows[: counts[0]]

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the first process."""

    def gradient_sum(self, model: nn.Module) -> Any:
        """Return a :class:`fastadapt.train.gradient_sum.GradientSum`; ``None`` for one process."""
        return None

    def before_step(self) -> None:
        """Prepare a training step that :meth:`gradient_sum` takes part in."""

    def after_reading(self) -> None:
        """Look whether training shall end, where all processes have read the last losses."""

    def if_stuck(self, function: Callable[[], object]) -> None:
        """Have a function called if this process waits for another one that is gone."""

    def check_same(self, what: str, value: object) -> None:
        """Refuse to go on where processes were given different things.

        Raises:
            InputError: a value differs.
        """
        if any(other != value for other in self.gather(value)):
            raise InputError(f"{what} differ between processes: give all of them the same files")


ALONE = Processes()


def check_one_process(what: str) -> None:
    """Refuse ``torchrun`` where several processes would each do the whole work.

    Raises:
        InputError: there are several processes.
    """
    if place_from_environment().size > 1:
        raise InputError(
            f"{what}: start this without torchrun; it trains one model in all processes"
        )


_connected = False


def note_connected() -> None:
    """Note that the processes are connected, and agree from here on on who prints an error."""
    global _connected
    _connected = True


def speaks() -> bool:
    """Whether this process prints an error that it has met.

    All processes meet a wrong option before they are connected: one of each machine says so.
    """
    try:
        return _connected or place_from_environment().local_rank == 0
    except InputError:
        return True


def end_silently(code: int) -> NoReturn:
    """End this process, whose error another one prints, after that one: torchrun then ends it."""
    time.sleep(HESITATION)
    raise SystemExit(code)


def without_place(environment: dict[str, str]) -> dict[str, Any]:
    """Return an environment for processes that are a job of their own."""
    ours = {*VARIABLES, "LOCAL_WORLD_SIZE"}
    return {name: value for name, value in environment.items() if name not in ours}
