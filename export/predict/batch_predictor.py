"""Predict batches of image files in workers of an engine: Ray Data, Spark, Daft."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastadapt.data.decode_on import DecodeOn
from fastadapt.decision import UNDECIDED, Decision, softmax

from .decode_ahead import DecodedBatch, compute
from .decoders import decoder_on
from .models import ImageModel
from .request import Request
from .settings import PredictSettings


class Outputs(NamedTuple):
    """What became of files: fp32 [files, outputs], and for each why not, and what is not read."""

    values: np.ndarray
    problems: list[str]
    dropped: list[tuple[str, ...]]


@dataclass
class _Call:
    """The paths of one call, and what has become of them.

    Attributes:
        paths: of images.
        found: what is known of them.
        left: images that are still to be computed.
        error: what ended the work on them.
    """

    paths: Sequence[str]
    found: Outputs
    left: int
    error: BaseException | None = None

    @property
    def over(self) -> bool:
        """Whether it has all outputs, or never will."""
        return not self.left or self.error is not None


class BatchPredictor:
    """Paths in, rows out: made once in each worker, then called with batches.

    Several threads may call at once. Their images are one stream: those of the next call are
    decoded while those of the one before are computed. Three calls at a time leave no gaps.

    >>> predict = BatchPredictor("bundle")
    >>> predict({"path": np.array(["a.png", "b.png"])})["prediction"]
    array(['crack', 'good'], dtype=object)

    Args:
        model: a bundle, the run folder of a training, or a :class:`Request`.
        device: ``"auto"`` (the GPU that the engine gives this worker, if any), ``"cpu"`` or
            ``"cuda"``.
        trust: run native code of a bundle that was not made on this machine.
        batch: images that are computed at once.
        workers: processes of this worker that decode.
        embeddings: give the features before the head, too.
        task: the one of several that is meant; all if ``None``.
        decode: ``"gpu"`` to decode JPEG files on the GPU.

    Raises:
        InputError: the model cannot be loaded, or lacks what is asked for.
    """

    def __init__(
        self,
        model: str | Request,
        *,
        device: str = "auto",
        trust: bool = False,
        batch: int = 32,
        workers: int = 1,
        embeddings: bool = False,
        task: str | None = None,
        decode: DecodeOn = "cpu",
    ):
        if not isinstance(model, Request):
            asked = PredictSettings(model=model, task=task, embeddings=embeddings)
            model = Request(asked, trust)
        self.model: ImageModel = model.open(device)
        self.batch = batch
        self._open = ExitStack()
        found = self.model
        open_decoder = decoder_on(decode, device)
        self._decode = self._open.enter_context(
            open_decoder(found.reading, found.value_range, batch, workers)
        )
        self._waiting: deque[_Call] = deque()
        self._turn, self._busy = threading.Condition(), False
        # Of the thread whose turn it is, as the model:
        self._begun: list[_Call] = []  # calls whose images are in the stream
        self._stream: Iterator[DecodedBatch] | None = None
        self._decoding: deque[tuple[_Call, int]] = deque()  # calls and places of their batches

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Add columns to a batch.

        Args:
            batch: columns by name, with ``path``; the others are kept.

        Returns:
            The columns, and ``prediction`` (texts), ``probabilities`` and ``logits``
            [images, classes], ``embeddings`` [images, dim] if asked for, and ``problem``: why a
            file cannot be read, else empty. Features alone are ``features``. Of several tasks each
            has columns of its own, ``prediction:TASK`` for one. Numbers of a file that cannot be
            read are NaN.
        """
        outputs, problems = self.outputs(list(map(_text, batch["path"])))
        found = {**batch, "problem": np.array(problems, dtype=object)}
        model = self.model
        for task in model.tasks:
            logits = outputs[:, task.columns]
            columns = _columns(logits, task.classes, task.decision, problems)
            found |= {f"{name}:{task.name}": values for name, values in columns.items()}
        if model.tasks:
            return found
        if not model.classes:
            return {**found, "features": outputs}
        logits, features = np.split(outputs, [len(model.classes)], axis=1)
        found |= _columns(logits, model.classes, model.decision, problems)
        return found | ({"embeddings": features} if features.shape[1] else {})

    def outputs(self, paths: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Return the model's outputs, NaN where a file cannot be read, and why it cannot.

        Args:
            paths: of images.

        Returns:
            fp32 [images, outputs], and for each image the reason or an empty text.
        """
        found = self.all_outputs(paths)
        return found.values, found.problems

    def all_outputs(self, paths: Sequence[str]) -> Outputs:
        """Return the same, and what of each file is not read, pages after the first for one."""
        values = np.full((len(paths), self.model.width), np.nan, np.float32)
        outputs = Outputs(values, [""] * len(paths), [()] * len(paths))
        call = _Call(paths, outputs, left=len(paths))
        self._waiting.append(call)
        while self._takes_turn(call):  # one thread at a time computes a batch, of whichever call
            try:
                self._advance()
            finally:
                with self._turn:
                    self._busy = False
                    self._turn.notify_all()
        if call.error is not None:
            raise call.error
        return call.found

    def _takes_turn(self, call: _Call) -> bool:
        """Wait until this thread may work, or its call is over; say whether it is to work."""
        with self._turn:
            self._turn.wait_for(lambda: call.over or not self._busy)
            if call.over:
                return False
            self._busy = True
            return True

    def _advance(self) -> None:
        """Compute the next batch of the stream, or end it where no call waits."""
        if self._stream is None:
            self._stream = self._decode(self._batches())
        try:
            decoded = next(self._stream, None)
            if decoded is None:
                self._stream = None
                return
            call, start = self._decoding.popleft()
            computed = compute(decoded, self.model.run, self.model.width)
        except BaseException as error:
            self._fail(error)
            raise
        found = call.found
        found.values[[start + place for place in computed.rows]] = computed.values
        for place, problem in computed.problems.items():
            found.problems[start + place] = problem
        for place, kinds in computed.dropped.items():
            found.dropped[start + place] = kinds
        call.left -= len(computed.rows) + len(computed.problems)
        if not call.left:
            self._begun.remove(call)

    def _batches(self) -> Iterator[Sequence[str]]:
        """Take batches from the calls that wait, until none does."""
        while self._waiting:
            call = self._waiting.popleft()
            if call.left:
                self._begun.append(call)
            for start in range(0, len(call.paths), self.batch):
                self._decoding.append((call, start))
                yield call.paths[start : start + self.batch]

    def _fail(self, error: BaseException) -> None:
        """Tell the calls whose images are in the stream that it broke; the next begin another."""
        for call in self._begun:
            call.error = error
        self._begun, self._stream = [], None
        self._decoding.clear()

    def close(self) -> None:
        """End the processes that decode."""
        self._open.close()


def _text(path: Any) -> str:
    """Return a path as text; engines have columns of bytes, too."""
    return os.fsdecode(path) if isinstance(path, bytes | os.PathLike) else str(path)


def _columns(
    logits: np.ndarray, classes: tuple[str, ...], decision: Decision, problems: list[str]
) -> dict[str, np.ndarray]:
    """Return predictions, probabilities and logits, by their names."""
    best = decision.of_logits(logits)
    names = [
        "" if problem or i == UNDECIDED else classes[i]
        for i, problem in zip(best, problems, strict=True)
    ]
    return {
        "prediction": np.array(names, dtype=object),
        "probabilities": softmax(logits),
        "logits": logits,
    }
