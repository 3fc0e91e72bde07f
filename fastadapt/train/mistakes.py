"""Draw the most confident mistakes: what a model is surely wrong about says most of its data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastadapt.data.decode import load_image
from fastadapt.data.pixels import ValueRange
from fastadapt.errors import InputError
from fastadapt.files import atomic_path
from fastadapt.kernels.common.arithmetic import ceil_div

MOST, COLUMNS = 12, 6
SIDE, GAP, LINE = 150, 10, 15  # pixels
LONGEST = 22  # letters of a class in a caption


@dataclass(frozen=True)
class Mistakes:
    """Images whose prediction is wrong, the surest first.

    Attributes:
        paths: of the images.
        labels, predictions: class indices.
        confidences: the probabilities of the predictions.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    predictions: tuple[int, ...]
    confidences: tuple[float, ...]

    @classmethod
    def find(
        cls,
        paths: Sequence[Path],
        labels: np.ndarray,
        predictions: np.ndarray,
        probabilities: np.ndarray,
    ) -> Self:
        """Find the surest mistakes, each image once.

        Args:
            paths: [N].
            labels, predictions: [N] class indices.
            probabilities: [N, K].
        """
        confidences = probabilities[np.arange(len(labels)), predictions]
        wrong = np.flatnonzero(labels != predictions)
        order = wrong[np.argsort(-confidences[wrong], kind="stable")]
        first = {paths[place]: place for place in reversed(order.tolist())}
        chosen = sorted(first.values(), key=lambda place: -confidences[place])[:MOST]
        return cls(
            tuple(paths[place] for place in chosen),
            tuple(int(labels[place]) for place in chosen),
            tuple(int(predictions[place]) for place in chosen),
            tuple(float(confidences[place]) for place in chosen),
        )


def draw_mistakes(
    path: str | os.PathLike[str],
    mistakes: Mistakes,
    classes: Sequence[str],
    value_range: ValueRange | None = None,
) -> None:
    """Write thumbnails with what they are and what was predicted; no file without mistakes.

    Args:
        path: of the PNG, written whole or not at all.
        mistakes: to draw.
        classes: names.
        value_range: of the pixels, as the model sees them.
    """
    Path(path).unlink(missing_ok=True)  # that of a run before
    count = len(mistakes.paths)
    if count == 0:
        return
    columns = min(count, COLUMNS)
    cell = (SIDE + GAP, SIDE + 3 * LINE + GAP)
    size = (columns * cell[0] + GAP, ceil_div(count, columns) * cell[1] + GAP)
    picture = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for place in range(count):
        left = GAP + place % columns * cell[0]
        top = GAP + place // columns * cell[1]
        try:
            image = load_image(mistakes.paths[place], value_range)
        except InputError:  # gone since it was predicted
            image = Image.new("RGB", (SIDE, SIDE), "lightgray")
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        if max(image.size) < SIDE:
            factor = SIDE / max(image.size)
            image = image.resize((round(image.width * factor), round(image.height * factor)), 0)
        picture.paste(image, (left, top))
        lines = (
            f"is {_short(classes[mistakes.labels[place]])}",
            f"said {_short(classes[mistakes.predictions[place]])}",
            f"{mistakes.confidences[place]:.1%}  {_short(mistakes.paths[place].name)}",
        )
        for number, line in enumerate(lines):
            pen.text((left, top + SIDE + number * LINE), line, fill="black", font=font)
    with atomic_path(path) as temporary:
        picture.save(temporary, "PNG")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
