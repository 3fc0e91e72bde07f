"""Predict or embed all images of some sources into one file, in bounded memory.

1. Sources are listed one by one; a batch is ``--batch`` of them, a part a fixed number of batches.
2. Processes decode batches into shared memory, ahead of the model (``decode_ahead``).
3. The model's outputs become rows; a finished part is written to ``FILE.parts`` (``parts``).
4. At the end the parts are joined to FILE. After a kill, ``--resume`` begins with the first
   part that was not finished.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from fastadapt.data.decode_pool import default_workers
from fastadapt.errors import InputError
from fastadapt.progress import progress_bars

from .decode_ahead import Computed, DecodedBatch, Decoder, compute, open_decoder
from .formats import FORMATS, Format, check_ending
from .parts import Part, Parts, digest_of
from .settings import EmbedSettings, PredictSettings, WorkSettings
from .sources import ImageList, Item

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from .columns import FeatureColumns, PredictionColumns
    from .models import ImageModel

PART = 1024  # images of a part, rounded up to whole batches


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        out: the results.
        images: number of images, whatever became of them.
        computed: images of this command; the others were finished before.
        unreadable: number of files that cannot be read.
        unreadable_file: lists them.
        seconds: of computing.
        metrics: where labels were given, as :func:`fastadapt.train.metrics.confusion_metrics`.
        notes: lines for the terminal: what was left out.
    """

    out: Path
    images: int
    computed: int
    unreadable: int
    unreadable_file: Path
    seconds: float
    metrics: dict[str, Any] | None
    notes: tuple[str, ...]


def predict_images(settings: PredictSettings, work: WorkSettings) -> Summary:
    """Predict the class of every image.

    Raises:
        InputError: the model, the images or the results that are there do not fit.
    """
    images = ImageList(work.images, settings.labels)
    _check(images, work)
    from .columns import PredictionColumns
    from .models import open_classifier

    model = open_classifier(settings.model, device=work.device, trust=work.trust)
    images.classes = model.classes
    with_target = settings.labels is not None
    columns = PredictionColumns(model, settings.logits, settings.top_k, with_target)
    asked = {"labels": settings.labels, "logits": settings.logits, "top_k": settings.top_k}
    return Job(model, images, columns, work, {"command": "predict", **asked}).run()


def embed_images(settings: EmbedSettings, work: WorkSettings) -> Summary:
    """Compute the features of every image, before the head.

    Raises:
        InputError: as for :func:`predict_images`.
    """
    images = ImageList(work.images)
    _check(images, work)
    from .columns import FeatureColumns
    from .models import open_embedder

    model = open_embedder(
        settings.model,
        device=work.device,
        trust=work.trust,
        weights=settings.weights,
        image_size=settings.image_size,
    )
    return Job(model, images, FeatureColumns(model), work, {"command": "embed"}).run()


def _check(images: ImageList, work: WorkSettings) -> None:
    check_ending(work.out)
    if work.out.is_dir():
        raise InputError(f"{work.out} is a folder; expected a file")
    images.check()


# As open_decoder.
OpenDecoder = Callable[..., AbstractContextManager[Decoder]]


class Job:
    """One model, its images, and the file that its rows go to.

    Args:
        model: what computes.
        images: in order.
        columns: what is written of its outputs.
        work: where to, in which batches.
        asked: further settings that the rows depend on.
        decoder: opens what decodes.
    """

    def __init__(
        self,
        model: ImageModel,
        images: ImageList,
        columns: PredictionColumns | FeatureColumns,
        work: WorkSettings,
        asked: dict[str, Any],
        decoder: OpenDecoder = open_decoder,
    ):
        self.model, self.images, self.columns, self.work = model, images, columns, work
        self.parts = Parts(work.out)
        self.rows: Format = FORMATS[work.out.suffix.lower()](columns.columns)
        self.batches_per_part = -(-PART // work.batch)
        self.identity = {"model": model.identity, "batch": work.batch, **asked}
        self._open_decoder = decoder

    def run(self) -> Summary:
        """Compute what is not finished, and join the parts."""
        work = self.work
        done = self.parts.begin(self.identity, resume=work.resume, overwrite=work.overwrite)
        items = iter(self.images)
        kept = self._skip(items, done)
        began = time.perf_counter()
        with progress_bars(work.quiet) as progress:
            task = progress.add_task(
                self.model.name, total=None, completed=kept, unit="images", note=""
            )
            if self.images.countable and not progress.disable:
                Thread(target=self._count, args=(progress, task), daemon=True).start()
            computed = self._compute(items, done, lambda count: progress.advance(task, count))
            seconds = time.perf_counter() - began
        count = done + -(-computed // (self.batches_per_part * work.batch))
        if not kept + computed:
            self.parts.remove()
            said = "; ".join(self.images.report.lines())
            raise InputError(
                f"there are no images in {', '.join(work.images)}" + (f" ({said})" if said else "")
            )
        unreadable, confusion = 0, Counter[tuple[int, int]]()
        for number in range(count):
            part = self.parts.read(number)
            unreadable += len(part.unreadable)
            confusion += part.confusion
        self.parts.join(count, self.rows)
        return Summary(
            work.out,
            kept + computed,
            computed,
            unreadable,
            self.parts.unreadable_file,
            seconds,
            self._metrics(confusion),
            tuple(self.images.report.lines()),
        )

    def _count(self, progress: Progress, task: TaskID) -> None:
        with suppress(Exception):  # whoever reads the images says what is wrong with them
            progress.update(task, total=self.images.count())

    def _skip(self, items: Iterator[Item], parts: int) -> int:
        """Pass over the images of finished parts; return how many they are."""
        kept = 0
        for number in range(parts):
            found = list(itertools.islice(items, self.batches_per_part * self.work.batch))
            self.parts.check_images(number, found)
            kept += len(found)
        return kept

    def _compute(self, items: Iterator[Item], number: int, advance: Callable[[int], Any]) -> int:
        """Write all parts from ``number`` on; return the number of images."""
        sent: deque[list[Item]] = deque()

        def batches() -> Iterator[list[str]]:
            while batch := list(itertools.islice(items, self.work.batch)):
                sent.append(batch)
                yield [item.path for item in batch]

        workers = default_workers() if self.work.workers is None else self.work.workers
        model = self.model
        total = 0
        part, listed = Part(), list[Item]()
        with self._open_decoder(
            model.reading, model.value_range, self.work.batch, workers
        ) as decode:
            for decoded in decode(batches()):
                batch = sent.popleft()
                self._add(part, batch, decoded)
                listed += batch
                total += len(batch)
                advance(len(batch))
                if len(listed) == self.batches_per_part * self.work.batch:
                    self._finish(number, part, listed)
                    number, part, listed = number + 1, Part(), []
        if listed:
            self._finish(number, part, listed)
        return total

    def _add(self, part: Part, batch: list[Item], decoded: DecodedBatch) -> None:
        computed: Computed = compute(decoded, self.model.run, self.model.width)
        problems = sorted(computed.problems.items())
        part.unreadable += [[batch[place].path, reason] for place, reason in problems]
        if not computed.rows:
            return
        readable = [batch[place] for place in computed.rows]
        paths, labels = [item.path for item in readable], [item.label for item in readable]
        self.rows.add(self.columns.values(paths, labels, computed.values))
        if any(labels):
            part.confusion += self.columns.confusion(labels, computed.values)

    def _finish(self, number: int, part: Part, items: list[Item]) -> None:
        part.images, part.digest = len(items), digest_of(items)
        self.parts.finish(number, part, self.rows)

    def _metrics(self, confusion: Counter[tuple[int, int]]) -> dict[str, Any] | None:
        if not confusion:
            return None
        import numpy as np

        from fastadapt.train.metrics import confusion_metrics

        classes = self.model.classes
        matrix = np.zeros((len(classes), len(classes)), np.int64)
        for pair, count in confusion.items():
            matrix[pair] = count
        metrics = confusion_metrics(matrix, classes)
        present = [row["recall"] for row in metrics["per_class"].values() if row["images"]]
        return {**metrics, "balanced_accuracy": sum(present) / len(present)}
