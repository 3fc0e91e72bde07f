"""Several processes of one job on this machine, connected as those that torchrun starts."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable


def run_processes(size: int, function: Callable[[], object]) -> list[int]:
    """Call a function in each of several processes; return their exit codes, by rank.

    They are forks of this one, which has all imported that they need.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_run, args=(rank, size, port, function)) for rank in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    for child in children:
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def _run(rank: int, size: int, port: int, function: Callable[[], object]) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        function()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(70)
