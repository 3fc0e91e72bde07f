"""Predict parts in a process of its own: the other end of :mod:`fastadapt.export.predict.devices`.

The process gets a request, says what it loaded, and computes the parts that it is sent until its
connection ends, whatever became of the process at the other end.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

from fastadapt.data.decode_on import DecodeOn
from fastadapt.errors import InputError, said_by_system

from .decoders import decoder_on
from .part_maker import PartMaker
from .request import Request, described
from .sources import Item

NumberedPart = tuple[int, list[Item]]  # a part's number and its images


@dataclass(frozen=True)
class Assignment:
    """What a process is to do.

    Attributes:
        request: the model and the columns.
        device: to compute on, as this process sees it.
        out: the file of the results, beside which parts are written.
        batch: images that are computed at once.
        size: images of a part.
        workers: processes that decode.
        decode: what decodes.
    """

    request: Request
    device: str
    out: Path
    batch: int
    size: int
    workers: int
    decode: DecodeOn = "cpu"


def main(connection_fd: int) -> None:
    """Serve until the connection ends.

    Receives an :class:`Assignment`, then parts ``(number, images)``, and ``None`` whenever there
    are no more for now. Sends ``("model", model)``, then ``("step", images, finished)`` for every
    batch, or ``("error", line)``, or ``("system", line)`` for what the system refused.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides what Ctrl-C means
    connection = Connection(connection_fd)
    try:
        _serve(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except InputError as error:
        connection.send(("error", str(error)))
    except OSError as error:  # a full disk, say, on which no other process can write either
        connection.send(("system", said_by_system(error)))


def _serve(connection: Connection) -> None:
    given: Assignment = connection.recv()
    model = given.request.open(given.device)
    connection.send(("model", described(model)))
    columns = given.request.columns(model)
    maker = PartMaker(model, columns, given.out, given.batch, given.size)
    received: SimpleQueue[NumberedPart | EOFError | None] = SimpleQueue()
    # Messages are taken at once, so that the sender never waits for this process.
    Thread(target=_receive, args=(connection, received), daemon=True).start()

    def parts(first: NumberedPart) -> Iterator[NumberedPart]:
        yield first
        while (part := _next(received)) is not None:
            yield part

    open_decoder = decoder_on(given.decode, given.device)
    with open_decoder(model.reading, model.value_range, given.batch, given.workers) as decode:
        while True:
            first = _next(received)
            if first is None:
                continue
            for step in maker.run(parts(first), decode):
                connection.send(("step", *step))


def _receive(connection: Connection, received: SimpleQueue[NumberedPart | EOFError | None]) -> None:
    try:
        while True:
            received.put(connection.recv())
    except (EOFError, OSError) as error:
        received.put(EOFError(str(error)))


def _next(received: SimpleQueue[NumberedPart | EOFError | None]) -> NumberedPart | None:
    found = received.get()
    if isinstance(found, EOFError):
        raise found
    return found
