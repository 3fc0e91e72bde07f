"""Decode every image of a data set once, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastadapt.data.dataset import Dataset, Sample
from fastadapt.data.decode import load_image
from fastadapt.errors import InputError
from fastadapt.progress import prefetch


def find_unreadable(
    dataset: Dataset, workers: int, on_image: Callable[[], None] | None = None
) -> list[tuple[Path, str]]:
    """Decode every image once and return the files that cannot be, and why.

    Args:
        dataset: whose images to decode.
        workers: threads that decode.
        on_image: called after every image, for a progress bar.
    """

    def problem(sample: Sample) -> tuple[Path, str] | None:
        try:
            load_image(sample.path)
        except InputError as error:
            return sample.path, str(error)
        return None

    found = []
    for result in prefetch(problem, dataset.samples, workers, ahead=4 * workers):
        if result:
            found.append(result)
        if on_image:
            on_image()
    return found
