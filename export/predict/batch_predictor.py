"""Predict batches of image files in workers of an engine: Ray Data, Spark, Daft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from fastadapt.data.decode_on import DecodeOn
from fastadapt.decision import UNDECIDED, Decision

from .decode_ahead import compute
from .decoders import decoder_on
from .models import ImageModel
from .request import Request
from .settings import PredictSettings


class Outputs(NamedTuple):
    """What became of files: fp32 [files, outputs], and for each why not, and what is not read."""

    values: np.ndarray
    problems: list[str]
    dropped: list[tuple[str, ...]]


class BatchPredictor:
    """Paths in, rows out: made once in each worker, then called with batches.

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
        outputs, problems = self.outputs([str(path) for path in batch["path"]])
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
        outputs = np.full((len(paths), self.model.width), np.nan, np.float32)
        problems = [""] * len(paths)
        dropped: list[tuple[str, ...]] = [()] * len(paths)
        starts = range(0, len(paths), self.batch)
        batches = [paths[start : start + self.batch] for start in starts]
        for start, decoded in zip(starts, self._decode(batches), strict=True):
            computed = compute(decoded, self.model.run, self.model.width)
            outputs[[start + place for place in computed.rows]] = computed.values
            for place, problem in computed.problems.items():
                problems[start + place] = problem
            for place, kinds in computed.dropped.items():
                dropped[start + place] = kinds
        return Outputs(outputs, problems, dropped)

    def close(self) -> None:
        """End the processes that decode."""
        self._open.close()


def _columns(
    logits: np.ndarray, classes: tuple[str, ...], decision: Decision, problems: list[str]
) -> dict[str, np.ndarray]:
    """Return predictions, probabilities and logits, by their names."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    best = decision.of_logits(np.nan_to_num(logits))
    names = [
        "" if problem or i == UNDECIDED else classes[i]
        for i, problem in zip(best, problems, strict=True)
    ]
    return {
        "prediction": np.array(names, dtype=object),
        "probabilities": powers / powers.sum(axis=1, keepdims=True),
        "logits": logits,
    }
