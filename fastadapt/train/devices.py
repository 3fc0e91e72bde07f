"""Choose the device of each process of a run, and connect the processes if there are several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from fastadapt.errors import InputError, counted
from fastadapt.locks import lock_folder
from fastadapt.processes import ALONE, Place, Processes, place_from_environment
from fastadapt.train.config import TrainConfig


def check_batch_sizes(config: TrainConfig, place: Place) -> None:
    """Refuse a batch that has fewer images than there are processes.

    Raises:
        InputError: it names the batch size.
    """
    for stage in range(1, config.stages + 1):
        _, _, batch_size = config.of_stage(stage)
        if batch_size < place.size:
            name = "batch_size" if stage == 1 or config.batch_size2 is None else "batch_size2"
            raise InputError(
                f"{name} is {batch_size}, and a batch is split over {place.size} processes: give "
                f"`{name}={place.size}` or more, or start fewer processes"
            )


def parse_device(name: str) -> torch.device:
    """Return a device by its name; ``"auto"`` is the first GPU, or the CPU.

    Raises:
        InputError: the device is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device is {name!r}; expected auto, cpu, cuda or cuda:0")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        here = f"{count} are there, from cuda:0" if count else "PyTorch finds no GPU"
        raise InputError(f"device is {name!r}, but {here}: give `device='auto'`")
    return device


def device_of_process(name: str, place: Place) -> str:
    """Return the device of this process of several, as :func:`parse_device` takes it.

    Raises:
        InputError: one GPU was named for all, or the machine has fewer GPUs than processes.
    """
    count = torch.cuda.device_count()
    if name.startswith("cuda:"):
        raise InputError(
            f"device is {name!r}, but {place.size} processes train, each on a GPU of its own: "
            "give `device=cuda`, or `device=cpu`"
        )
    if name not in ("auto", "cuda") or count == 0:
        return name
    if place.local_size > count:
        raise InputError(
            f"{place.local_size} processes were started on a machine with "
            f"{counted(count, 'GPU')}: start "
            f"them with torchrun --nproc-per-node {count}"
        )
    return f"cuda:{place.local_rank}"


def together(device: torch.device) -> AbstractContextManager[Processes]:
    """Return the processes that train together, connected inside the context."""
    if place_from_environment().size == 1:
        return nullcontext(ALONE)
    from fastadapt.train.distributed import connected  # torch.distributed: not for one process

    return connected(device)


@contextmanager
def locked(processes: Processes, folder: Path) -> Iterator[None]:
    """Let the first process hold the lock of a folder that all write into.

    Raises:
        InputError: another job holds it.
    """
    with ExitStack() as stack:
        processes.on_first(lambda: stack.enter_context(lock_folder(folder)))
        yield
