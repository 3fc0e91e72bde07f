"""Compute parts of the results: decoded batches to rows, and finished parts to disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .decode_ahead import Decoder, compute
from .formats import FORMATS, Format
from .parts import Part, Parts, digest_of
from .sources import Item

if TYPE_CHECKING:
    from .columns import Columns
    from .models import ImageModel

NO_NUMBERS = "numbers: outputs of the model are NaN or infinite"  # completes "2 images lose"
PART = 1024  # images of a part, rounded up to whole batches

# Numbers of parts, each with its images.
Todo = Iterable[tuple[int, Iterable[Item]]]


class Step(NamedTuple):
    """What one batch did: its images, and the part that it finished."""

    images: int
    finished: int | None


def part_size(batch: int) -> int:
    """Return the images of a part: whole batches, so that a part's rows depend on no other's."""
    return -(-PART // batch) * batch


class PartMaker:
    """Compute parts with one model, and write them beside the results.

    Args:
        model: that computes.
        columns: what is written of its outputs.
        out: the file of the results.
        batch: images that are computed at once.
        size: images of a part; the last may have fewer.
    """

    def __init__(self, model: ImageModel, columns: Columns, out: Path, batch: int, size: int):
        self.model, self.columns, self.batch, self.size = model, columns, batch, size
        self.parts = Parts(out)
        self.rows: Format = FORMATS[out.suffix.lower()](columns.columns)

    def run(self, todo: Todo, decode: Decoder) -> Iterator[Step]:
        """Compute parts, decoding batches of the next ones ahead.

        Args:
            todo: the parts; their images are taken as they are needed.
            decode: from paths to pixels.

        Yields:
            A step after each batch.
        """
        sent: deque[tuple[int, list[Item]]] = deque()

        def batches() -> Iterator[list[str]]:
            for number, items in todo:
                images = iter(items)
                while batch := list(islice(images, self.batch)):
                    sent.append((number, batch))
                    yield [item.path for item in batch]

        part, listed, current = Part(), list[Item](), -1
        for decoded in decode(batches()):
            number, batch = sent.popleft()
            if listed and number != current:  # a short part, the last of all
                self.finish(current, part, listed)
                yield Step(0, current)
                part, listed = Part(), []
            current = number
            computed = compute(decoded, self.model.run, self.model.width)
            self.add(part, batch, computed.rows, computed.values, computed.problems)
            for place, dropped in sorted(computed.dropped.items()):
                for what in dropped:
                    part.drop(what, batch[place].path)
            listed += batch
            if len(listed) < self.size:
                yield Step(len(batch), None)
                continue
            self.finish(number, part, listed)
            part, listed = Part(), []
            yield Step(len(batch), number)
        if listed:
            self.finish(current, part, listed)
            yield Step(0, current)

    def add(
        self,
        part: Part,
        batch: list[Item],
        rows: list[int],
        outputs: np.ndarray,
        problems: dict[int, str],
    ) -> None:
        """Add a batch to a part.

        Args:
            part: that is being made.
            batch: its images.
            rows: places in the batch of those that could be read, ascending.
            outputs: of the model for them, fp32 [rows, outputs].
            problems: why the others cannot be read, by place.
        """
        part.unreadable += [[batch[place].path, why] for place, why in sorted(problems.items())]
        if not rows:
            return
        readable = [batch[place] for place in rows]
        paths, labels = [item.path for item in readable], [item.label for item in readable]
        for row in np.flatnonzero(~np.isfinite(outputs).all(axis=1)).tolist():
            part.drop(NO_NUMBERS, paths[row])
        self.rows.add(self.columns.values(paths, labels, outputs))
        if any(labels):
            part.confusion += self.columns.confusion(labels, outputs)

    def finish(self, number: int, part: Part, items: list[Item]) -> None:
        """Write a part to disk."""
        part.images, part.digest = len(items), digest_of(items)
        self.parts.finish(number, part, self.rows)
