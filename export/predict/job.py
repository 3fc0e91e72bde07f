"""Predict or embed all images of some sources into one file, in bounded memory.

1. Sources are listed one by one; a batch is ``--batch`` of them, a part a fixed number of batches.
2. Processes decode batches into shared memory, ahead of the model (``decode_ahead``).
3. The model's outputs become rows; a finished part is written to ``FILE.parts`` (``parts``).
4. At the end the parts are joined to FILE. After a kill, ``--resume`` begins with the first
   part that was not finished.
"""

from __future__ import annotations

import csv
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol

from fastadapt.data.decode_pool import default_workers
from fastadapt.decision import UNDECIDED
from fastadapt.errors import InputError, counted, form, printable, said_by_system
from fastadapt.progress import progress_bars

from .complete import check_complete
from .decode_ahead import open_decoder
from .decoders import OpenDecoder, decoder_on
from .formats import check_ending
from .part_maker import PartMaker, Todo, part_size
from .parts import KEPT, Part, Parts
from .settings import EmbedSettings, PredictSettings, WorkSettings
from .sources import STDIN, ImageList, Item, ListDigest

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from .columns import Columns
    from .models import ImageModel
    from .request import Request


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        out: the results.
        images: number of images, whatever became of them; 0 where all was done before.
        computed: images of this command; the others were finished before.
        unreadable: number of files that cannot be read.
        unreadable_file: lists them.
        seconds: of computing.
        metrics: where labels were given, as :func:`fastadapt.train.metrics.confusion_metrics`, of
            the images that are decided; ``undecided`` counts the others.
        notes: lines for the terminal: what was left out.
        unreadable_folders: number of folders that cannot be entered.
    """

    out: Path
    images: int
    computed: int
    unreadable: int
    unreadable_file: Path
    seconds: float
    metrics: dict[str, Any] | None
    notes: tuple[str, ...]
    unreadable_folders: int = 0


def predict_images(settings: PredictSettings, work: WorkSettings) -> Summary:
    """Predict the class of every image.

    Raises:
        InputError: the model, the images or the results that are there do not fit.
    """
    return _run(settings, work, ImageList(work.images, settings.labels))


def embed_images(settings: EmbedSettings, work: WorkSettings) -> Summary:
    """Compute the features of every image, before the head.

    Raises:
        InputError: as for :func:`predict_images`.
    """
    return _run(settings, work, ImageList(work.images))


def _run(
    settings: PredictSettings | EmbedSettings, work: WorkSettings, images: ImageList
) -> Summary:
    check_ending(work.out)
    if work.out.is_dir():
        raise InputError(f"{work.out} is a folder; expected a file")
    images.check()
    _check_not_a_source(work)
    images.report.own = Parts(work.out).own
    from .request import Request

    request = Request(settings, work.trust, work.decode)
    if work.resume and Parts(work.out).complete:
        note = check_complete(request, Parts(work.out), images)
        Parts(work.out).remove()  # killed while it did that
        return _nothing_to_do(work.out, note)
    if work.executor == "ray":
        from .ray_executor import RayPool

        with RayPool(request, work) as pool:
            return _job(request, work, images, pool.model, pool).run()
    if work.devices:
        from .devices import DevicePool

        with DevicePool(request, work) as devices:
            return _job(request, work, images, devices.model, devices).run()
    return _job(request, work, images, request.open(work.device), None).run()


def _check_not_a_source(work: WorkSettings) -> None:
    """Refuse to replace a table of images by its results, or by what lies beside them.

    Raises:
        InputError: as said.
    """
    parts = Parts(work.out)
    written = {path.resolve() for path in (work.out, parts.unreadable_file, parts.job_file)}
    for source in work.images:
        if source != STDIN and Path(source).resolve() in written:
            raise InputError(
                f"{source} lists the images, and would be replaced by the results: choose another "
                "`out`"
            )


def _job(
    request: Request,
    work: WorkSettings,
    images: ImageList,
    model: ImageModel,
    pool: Pool | None,
) -> Job:
    images.classes = model.classes
    images.check_labels()
    decoder = open_decoder if pool is not None else decoder_on(work.decode, work.device)
    return Job(model, images, request.columns(model), work, request.identity, decoder, pool)


def _nothing_to_do(out: Path, note: str) -> Summary:
    """Tell of results that are complete, whose unreadable files still count."""
    file = Parts(out).unreadable_file
    unreadable = 0
    if file.is_file():
        with file.open(encoding="utf-8", newline="") as lines:
            unreadable = sum(1 for _ in csv.reader(lines)) - 1
    return Summary(out, 0, 0, unreadable, file, 0.0, None, (note,))


@dataclass
class _Counts:
    """Images of parts that were finished before, and of those that this command computed."""

    kept: int = 0
    computed: int = 0


@contextmanager
def _telling_what_is_kept() -> Iterator[None]:
    """Say of what the system refuses, to write to a full disk for one, how to go on."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{said_by_system(error)}; {KEPT}") from error


class Pool(Protocol):
    """What computes parts elsewhere, and writes them."""

    def run(self, todo: Todo, advance: Callable[[int], Any]) -> None:
        """Compute all parts.

        Args:
            todo: the parts; taken as they are needed.
            advance: called with numbers of images that were computed since the last call.
        """


class Job:
    """One model, its images, and the file that its rows go to.

    Args:
        model: what computes.
        images: in order.
        columns: what is written of its outputs.
        work: where to, in which batches.
        asked: further settings that the rows depend on.
        decoder: opens what decodes.
        pool: computes the parts instead of this process.
    """

    def __init__(
        self,
        model: ImageModel,
        images: ImageList,
        columns: Columns,
        work: WorkSettings,
        asked: dict[str, Any],
        decoder: OpenDecoder = open_decoder,
        pool: Pool | None = None,
    ):
        self.model, self.images, self.work, self.pool = model, images, work, pool
        self.size = part_size(work.batch)
        self.maker = PartMaker(model, columns, work.out, work.batch, self.size)
        self.parts, self.rows = self.maker.parts, self.maker.rows
        self.identity = {"model": model.identity, "batch": work.batch, **asked}
        self._digest = ListDigest(images.labels)
        self._open_decoder = decoder

    def run(self) -> Summary:
        """Compute what is not finished, and join the parts."""
        work = self.work
        finished = self.parts.begin(self.identity, resume=work.resume, overwrite=work.overwrite)
        began = time.perf_counter()
        counts = _Counts()
        with progress_bars(work.quiet) as progress:
            task = progress.add_task(self.model.name, total=None, unit="images", note="")
            if self.images.countable and not progress.disable:
                Thread(target=self._count, args=(progress, task), daemon=True).start()

            def keep(count: int) -> None:
                counts.kept += count
                progress.tasks[0].completed += count  # as no progress of this command's

            def advance(count: int) -> None:
                counts.computed += count
                progress.advance(task, count)

            with _telling_what_is_kept():
                self._compute(self._todo(finished, keep), advance)
            seconds = time.perf_counter() - began
        total = counts.kept + counts.computed
        if not total:
            self.parts.remove()
            said = "; ".join(self.images.lines())
            raise InputError(
                f"there are no images in {', '.join(work.images)}" + (f" ({said})" if said else "")
            )
        count = -(-total // self.size)
        unreadable, confusion, all_parts = 0, Counter[tuple[int, int]](), Part()
        for number in range(count):
            part = self.parts.read(number)
            unreadable += len(part.unreadable)
            confusion += part.confusion
            for what, (files, first) in part.dropped.items():
                all_parts.drop(what, first, files)
        with _telling_what_is_kept():
            self.parts.join(count, self.rows, {**self.identity, "images": self._digest.to_dict()})
        return Summary(
            work.out,
            total,
            counts.computed,
            unreadable,
            self.parts.unreadable_file,
            seconds,
            self._metrics(confusion),
            (
                *self.images.lines(),
                *(
                    f"warning: {files} of {counted(total, 'image')} "
                    f"{form(files, 'loses', 'lose')} {what} (first {printable(first)})"
                    for what, (files, first) in all_parts.dropped.items()
                ),
                *self._without_labels(confusion),
            ),
            self.images.report.unreadable_folders,
        )

    def _without_labels(self, confusion: Counter[tuple[int, int]]) -> list[str]:
        asked = self.images.labels is not None and not confusion
        return ["no image that can be read has a label: there are no metrics"] if asked else []

    def _count(self, progress: Progress, task: TaskID) -> None:
        with suppress(Exception):  # whoever reads the images says what is wrong with them
            progress.update(task, total=self.images.count())

    def _todo(
        self, finished: set[int], keep: Callable[[int], None]
    ) -> Iterator[tuple[int, Iterator[Item]]]:
        """Give the parts that are not finished; pass over the images of those that are."""
        items = self._hashed()
        for number in itertools.count():
            if number in finished:
                found = list(itertools.islice(items, self.size))
                self.parts.check_images(number, found)
                keep(len(found))
                continue
            first = next(items, None)
            if first is None:
                break
            yield number, itertools.chain([first], itertools.islice(items, self.size - 1))
        if any(left > number for left in finished):
            self.parts.check_images(max(finished), [])

    def _hashed(self) -> Iterator[Item]:
        for item in self.images:
            self._digest.add(item)
            yield item

    def _compute(self, todo: Todo, advance: Callable[[int], None]) -> None:
        """Write all parts."""
        if self.pool is not None:
            self.pool.run(todo, advance)
            return
        work, model = self.work, self.model
        workers = default_workers() if work.workers is None else work.workers
        with self._open_decoder(model.reading, model.value_range, work.batch, workers) as decode:
            for step in self.maker.run(todo, decode):
                advance(step.images)

    def _metrics(self, confusion: Counter[tuple[int, int]]) -> dict[str, Any] | None:
        if not confusion:
            return None
        import numpy as np

        from fastadapt.train.metrics import confusion_metrics

        classes = self.model.classes
        matrix = np.zeros((len(classes), len(classes)), np.int64)
        undecided = 0
        for (label, guess), count in confusion.items():
            if guess == UNDECIDED:
                undecided += count
            else:
                matrix[label, guess] = count
        if not matrix.any():
            return {"images": 0, "undecided": undecided}
        metrics = confusion_metrics(matrix, classes)
        present = [row["recall"] for row in metrics["per_class"].values() if row["images"]]
        balanced = sum(present) / len(present)
        return {**metrics, "balanced_accuracy": balanced, "undecided": undecided}
