"""Compute the parts of a job with Ray Data, on one machine or on a cluster.

1. This process lists the images; each part becomes one block in Ray's object store.
2. Workers (actors) load the model once, with one GPU each if there is any, and map blocks: paths
   in, outputs out. The task of a worker that is lost is Ray's to repeat.
3. This process writes each part as its rows arrive, in whatever order. Rows carry the number of
   their part and their place in it, so that none is missing or there twice.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from fastadapt.data.decode_on import DecodeOn
from fastadapt.errors import InputError, counted, first_line

from .batch_predictor import BatchPredictor
from .models import ImageModel
from .part_maker import PartMaker, Todo, part_size
from .parts import KEPT, Part
from .request import Request, described
from .settings import WorkSettings
from .sources import Item

# No telemetry, and no lines of its own on the terminal but errors that end it.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
ORDER, PLACE, PATH, LABEL, PROBLEM, OUTPUTS = "part", "place", "path", "label", "problem", "outputs"
DROPPED = "dropped"  # one kind a line
CONNECT = 10.0  # seconds
# Parts that a worker has at a time: it decodes the next while it computes one and hands one back.
AT_ONCE = 3


class RayPool:
    """Ray's workers; a context manager.

    Args:
        request: the model and the columns.
        work: the cluster's address, the number of workers, batch, and the file of the results.

    Attributes:
        model: what a worker loaded, without its function.

    Raises:
        InputError: Ray is not installed or does not start; the model does not load.
    """

    def __init__(self, request: Request, work: WorkSettings):
        os.environ.update(QUIET)  # before the import
        try:
            import ray
            import ray.data
        except ImportError:
            raise InputError(
                "`executor='ray'` needs Ray Data: pip install 'fastadapt[ray]'"
            ) from None
        self._ray: Any = ray
        self._request, self._work = request, work
        check_address(work.ray_address)
        try:
            ray.init(
                address=work.ray_address or "local",
                include_dashboard=None if work.ray_address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:  # Ray's own have no common base
            raise InputError(f"Ray does not start: {first_line(error)}") from error
        try:
            self._plan()
            self.model: ImageModel = self._loaded()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End Ray, or leave the cluster."""
        with suppress(Exception):
            self._ray.shutdown()

    def _plan(self) -> None:
        """Decide how many workers there are, and what each gets."""
        there = self._ray.cluster_resources()
        gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
        self._gpus = 1 if gpus else 0
        self._count = self._work.ray_workers or gpus or cpus
        if gpus and self._count > gpus:
            raise InputError(f"`ray_workers` is {self._count}, and Ray has {counted(gpus, 'GPU')}")
        share = max(cpus // self._count, 1)
        self._workers = self._work.workers or share

    def _loaded(self) -> ImageModel:
        """Load the model in a worker, to know its classes and what it runs in."""
        remote = self._ray.remote(num_cpus=1, num_gpus=self._gpus)(_Loader)
        loader = remote.remote(self._request)
        try:
            found = self._ray.get(loader.load.remote())
        except self._ray.exceptions.RayError as error:
            raise InputError(
                f"Ray's worker ended while it loaded {self._request.settings.model}: "
                f"{first_line(error)}"
            ) from error
        # Killed, it leaves its GPU to the next worker seconds sooner than if it ended.
        self._ray.kill(loader)
        if isinstance(found, str):
            raise InputError(found)
        return found

    def run(self, todo: Todo, advance: Callable[[int], Any]) -> None:
        """Compute all parts.

        Args:
            todo: the parts.
            advance: called with the number of images of each part.

        Raises:
            InputError: Ray gave up.
        """
        work, request = self._work, self._request
        columns = request.columns(self.model)
        maker = PartMaker(self.model, columns, work.out, work.batch, part_size(work.batch))
        counts: dict[int, int] = {}
        blocks = []
        for number, items in todo:
            listed = list(items)
            counts[number] = len(listed)
            blocks.append(self._ray.put(_block(number, listed)))
        if not blocks:
            return
        try:
            for number, rows in self._rows(blocks, counts):
                _write(maker, number, rows, self.model.width)
                advance(len(rows[PLACE]))
        except self._ray.exceptions.RayError as error:
            raise InputError(f"Ray gave up: {first_line(error)}; {KEPT}") from error
        if counts:
            raise InputError(f"Ray lost {counted(len(counts), 'part')}; {KEPT}")

    def _rows(
        self, blocks: list[Any], counts: dict[int, int]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Run the workers; yield each part once all of its rows are there."""
        data, work = self._ray.data, self._work
        context = data.DataContext.get_current()
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context.enable_progress_bars = False
        mapped = data.from_arrow_refs(blocks).map_batches(
            RayWorker,
            fn_constructor_args=(self._request, work.batch, self._workers, work.decode),
            batch_size=part_size(work.batch),  # Ray demands a number for workers with GPUs
            batch_format="numpy",
            num_cpus=1,
            num_gpus=self._gpus,
            compute=data.ActorPoolStrategy(
                size=min(self._count, len(blocks)),
                max_tasks_in_flight_per_actor=AT_ONCE + 1,
                max_concurrent_calls_per_actor=AT_ONCE,
                enable_true_multi_threading=True,
            ),
        )
        waiting: dict[int, list[dict[str, np.ndarray]]] = {}
        for batch in mapped.iter_batches(batch_size=None, batch_format="numpy"):
            for number in np.unique(batch[ORDER]).tolist():  # blocks may be split or joined
                if number not in counts:
                    continue
                rows = batch[ORDER] == number
                waiting.setdefault(number, []).append({k: v[rows] for k, v in batch.items()})
                if sum(len(piece[PLACE]) for piece in waiting[number]) == counts[number]:
                    del counts[number]
                    yield number, _joined(waiting.pop(number))


class _Loader:
    """Loads a model, and says what it is or what is wrong with it."""

    def __init__(self, request: Request):
        self._request = request

    def load(self) -> ImageModel | str:
        try:
            return described(self._request.open("auto"))
        except InputError as error:
            return str(error)


class RayWorker:
    """What a worker runs, in several threads: paths in, outputs out.

    Args:
        request: the model.
        batch: images that are computed at once.
        workers: processes that decode.
        decode: as for :class:`BatchPredictor`.
    """

    def __init__(self, request: Request, batch: int, workers: int, decode: DecodeOn = "cpu"):
        self.predictor = BatchPredictor(request, batch=batch, workers=workers, decode=decode)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add outputs, problems and what is not read to a block of paths."""
        found = self.predictor.all_outputs(list(map(_decoded, block[PATH])))
        texts = {PROBLEM: found.problems, DROPPED: ["\n".join(kinds) for kinds in found.dropped]}
        columns = {name: np.array(values, dtype=object) for name, values in texts.items()}
        return {**block, OUTPUTS: found.values, **columns}


def _block(number: int, items: list[Item]) -> Any:
    """Make a table of a part's images; names of files need not be text, and travel as bytes."""
    import pyarrow

    return pyarrow.table(
        {
            ORDER: pyarrow.array([number] * len(items), pyarrow.int64()),
            PLACE: pyarrow.array(range(len(items)), pyarrow.int64()),
            PATH: pyarrow.array([os.fsencode(item.path) for item in items], pyarrow.binary()),
            LABEL: pyarrow.array([item.label for item in items], pyarrow.string()),
        }
    )


def check_address(address: str | None) -> None:
    """Refuse a cluster that does not answer, for which Ray would wait many minutes.

    Args:
        address: ``HOST:PORT``, alone or after ``ray://``; what names no host is Ray's to judge.

    Raises:
        InputError: nothing answers there.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"ray_address is {address!r}, where nothing answers ({first_line(error)}): is the "
            "cluster started, and is that its head?"
        ) from None


def _decoded(path: bytes) -> str:
    return os.fsdecode(bytes(path))


def _joined(pieces: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the rows of a part, in the order of their places."""
    rows = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    order = np.argsort(rows[PLACE])
    return {key: values[order] for key, values in rows.items()}


def _write(maker: PartMaker, number: int, rows: dict[str, np.ndarray], width: int) -> None:
    items = [Item(_decoded(p), str(k)) for p, k in zip(rows[PATH], rows[LABEL], strict=True)]
    problems = {place: str(text) for place, text in enumerate(rows[PROBLEM]) if text}
    readable = [place for place in range(len(items)) if place not in problems]
    outputs = np.stack([np.asarray(row, np.float32) for row in rows[OUTPUTS]]).reshape(-1, width)
    part = Part()
    maker.add(part, items, readable, outputs[readable], problems)
    for item, kinds in zip(items, rows[DROPPED], strict=True):
        for what in str(kinds).splitlines():
            part.drop(what, item.path)
    maker.finish(number, part, items)
