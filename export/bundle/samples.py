"""The images that parity is checked on; some become the bundle's golden samples."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastadapt.data.decode import load_image
from fastadapt.data.pixels import ValueRange
from fastadapt.data.preprocess import Preprocess
from fastadapt.data.table import list_table
from fastadapt.data.walker import WalkReport, walk
from fastadapt.errors import InputError, counted
from fastadapt.train.run_folder import SPLITS

from ..graph_input import GraphInput, resize_as_graph

GOLDEN_SAMPLES = 16
LONGEST_SIDE = 1024  # larger images are reduced first, since they are stored as decoded


@dataclass(frozen=True)
class Sample:
    """An image for the parity check: a file, or a synthetic one.

    Attributes:
        path: of the file; a synthetic image's name.
        label: name of its class, if that is known.
        image: the synthetic image, RGB.
        tasks: names of its classes in several tasks, where they are known.
    """

    path: Path
    label: str | None = None
    image: Image.Image | None = None
    tasks: Mapping[str, str] = field(default_factory=dict, hash=False)  # of no hash itself

    def read(self, intensity_range: ValueRange | None = None) -> Image.Image:
        """Decode the file as RGB, or return the synthetic image, which has 8 bits."""
        return load_image(self.path, intensity_range) if self.image is None else self.image


@dataclass(frozen=True)
class Samples:
    """Images for the parity check.

    Attributes:
        samples: all that may be chosen.
        origin: where they are from, in words.
        calibration, validation: files for INT8 and FP8, no image in both; none if synthetic.
    """

    samples: tuple[Sample, ...]
    origin: str
    calibration: tuple[Sample, ...] = ()
    validation: tuple[Sample, ...] = ()


def run_samples(run: Path, images: str | Path | None, fewest: int) -> Samples:
    """List a folder's images, or those of a run's validation split.

    Raises:
        InputError: there are fewer than ``fewest``, or some are missing.
    """
    remedy = "give a folder of images like the training's with `images=...`"
    if images is not None:
        return folder_samples(images, fewest)
    if not (run / SPLITS).is_file():
        raise InputError(
            f"{run} records no images ({SPLITS}), and parity is checked on real ones: {remedy}"
        )
    try:
        rows = list_table(run / SPLITS, check_files=False)
    except InputError as error:
        raise InputError(f"{error} {remedy}") from None
    if not any(row.split for row in rows):  # of folds, each image was held out by one
        every = tuple(Sample(row.path, row.label) for row in rows if row.path.is_file())
        origin = f"the images of {run}, each of which one fold held out"
        _check_count(every, fewest, origin, remedy)
        return Samples(every, origin, every[::2], every[1::2])
    splits = {
        split: tuple(Sample(row.path, row.label) for row in rows if row.split == split)
        for split in ("train", "val")
    }
    samples = splits["val"]
    gone = [sample.path for sample in samples if not sample.path.is_file()]
    if gone:
        raise InputError(
            f"{len(gone)} of the {len(samples)} validation images of {run} are not there any "
            f"more, {gone[0]} for one: {remedy}"
        )
    origin = f"the validation split of {run}"
    _check_count(samples, fewest, origin, remedy)
    training = tuple(sample for sample in splits["train"] if sample.path.is_file())
    return Samples(samples, origin, training, samples)


def merge_samples(tasks: Mapping[str, Samples]) -> Samples:
    """Merge the images of several runs: one sample of an image, with its class in each task.

    An image that one run was trained on and another held out is not among those that calibrate.

    Args:
        tasks: each task's own images.
    """

    def merged(lists: Mapping[str, Sequence[Sample]]) -> tuple[Sample, ...]:
        known: dict[Path, dict[str, str]] = {}
        # In turns, so that the first few are of all runs.
        for row in itertools.zip_longest(*lists.values()):
            for task, sample in zip(lists, row, strict=True):
                if sample is None:
                    continue
                classes = known.setdefault(sample.path, {})
                if sample.label is not None:
                    classes[task] = sample.label
        return tuple(
            Sample(path, _said(found, lists), tasks=found) for path, found in known.items()
        )

    validation = merged({task: found.validation for task, found in tasks.items()})
    held_out = {sample.path for sample in validation}
    calibration = merged({task: found.calibration for task, found in tasks.items()})
    return Samples(
        merged({task: found.samples for task, found in tasks.items()}),
        "; ".join(dict.fromkeys(found.origin for found in tasks.values())),
        tuple(sample for sample in calibration if sample.path not in held_out),
        validation,
    )


def _said(classes: Mapping[str, str], tasks: Iterable[str]) -> str | None:
    """Return an image's classes in several tasks as one text, in the tasks' order."""
    return ", ".join(f"{task}: {classes[task]}" for task in tasks if task in classes) or None


def folder_samples(images: str | Path, fewest: int, option: str = "images") -> Samples:
    """List a folder's images; the names of their folders are their labels.

    Raises:
        InputError: it is no folder, or holds fewer than ``fewest`` images.
    """
    root = Path(images)
    if not root.is_dir():
        raise InputError(f"{root} is no folder; `{option}` is to be one")
    report = WalkReport()
    files = sorted(walk(root, report))
    samples = tuple(
        Sample(path, path.parent.name if path.parent != root else None) for path in files
    )
    _check_count(
        samples,
        fewest,
        f"the folder {root}",
        "; ".join(["give one with more images", *report.lines()]),
    )
    return Samples(samples, f"the folder {root}", samples[::2], samples[1::2])


def synthetic_samples(preprocess: Preprocess, count: int = GOLDEN_SAMPLES) -> Samples:
    """Make clouds of colour, the same ones every time, where no images are at hand.

    They are noise at octaves from 2 × 2 patches on, each half as strong as the one before: edges
    and surfaces at every scale, as photographs have, so that a model's outputs vary. They show
    that two models are the same as well as any image, but not how accurate a model is.
    """
    _, height, width = preprocess.input_size
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        values = np.full((height, width, 3), 128.0)
        values += rng.normal(0, 30, 3)  # a tint
        patches, strength = 2, 60.0
        while patches <= min(height, width):
            noise = rng.normal(0, strength, (patches, patches, 3)).astype(np.float32)
            planes = [
                Image.fromarray(noise[..., c]).resize((width, height), Image.Resampling.BICUBIC)
                for c in range(3)
            ]
            values += np.stack([np.asarray(plane) for plane in planes], axis=-1)
            patches, strength = 2 * patches, strength / 2
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        samples.append(Sample(Path(f"synthetic-{index:02d}"), None, image))
    return Samples(tuple(samples), "synthetic: clouds of colour, no images were given")


def choose(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Choose samples, as evenly over the classes as possible, the same ones every time."""
    shuffled = sorted(samples, key=lambda sample: sample.path)
    random.Random(0).shuffle(shuffled)
    seen: dict[str | None, int] = {}
    ranked = []
    for sample in shuffled:
        seen[sample.label] = seen.get(sample.label, 0) + 1
        ranked.append((seen[sample.label], sample))
    return [sample for _, sample in sorted(ranked, key=lambda pair: pair[0])][:count]


@dataclass(frozen=True)
class Pixels:
    """The chosen samples' pixels, uint8.

    Attributes:
        images: the decoded samples, RGB, none longer than 1,024 pixels.
        given: [B, 3, H, W] for :meth:`GraphInput.array`: preprocessed, or, if the graph resizes,
            decoded and of one size.
        model: [B, 3, h, w], the model's input before normalisation.
        training: [B, 3, h, w], the same images through the training's preprocessing; differs from
            ``model`` where the graph's filter rounds differently.
    """

    images: tuple[Image.Image, ...]
    given: Tensor
    model: Tensor
    training: Tensor


def read_pixels(samples: list[Sample], graph_input: GraphInput) -> Pixels:
    """Read samples as a bundle's graph takes them.

    Images of more than 1,024 pixels are reduced first. If the graph resizes, all are brought to
    the most frequent size.
    """
    preprocess = graph_input.preprocess
    shown = preprocess.intensity_range
    images = tuple(_reduced(sample.read(shown)) for sample in samples)
    if not graph_input.resize:
        pixels = torch.stack([preprocess.transform(image) for image in images])
        return Pixels(images, pixels, pixels, pixels)
    size = Counter(image.size for image in images).most_common(1)[0][0]
    images = tuple(image.resize(size, Image.Resampling.BICUBIC) for image in images)
    decoded = np.stack([np.asarray(image) for image in images])
    return Pixels(
        images,
        torch.from_numpy(decoded).movedim(-1, 1).contiguous(),
        torch.from_numpy(np.ascontiguousarray(resize_as_graph(decoded, preprocess))),
        torch.stack([preprocess.transform(image) for image in images]),
    )


def _reduced(image: Image.Image) -> Image.Image:
    factor = LONGEST_SIDE / max(image.size)
    if factor >= 1:
        return image
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _check_count(samples: tuple[Sample, ...], fewest: int, where: str, remedy: str) -> None:
    if len(samples) < fewest:
        raise InputError(
            f"{where} has {counted(len(samples), 'image')}; the parity check needs at least "
            f"{fewest}: {remedy}"
        )
