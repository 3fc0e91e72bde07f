"""Golden samples: a few images as decoded, the model's inputs of them, and the right outputs.

The images are PNG files of the pixels alone: no EXIF, no file names. ``golden.safetensors`` holds
what preprocessing makes of them and what the trained model answers. So a bundle can be verified
all the way from pixels, and ``--golden DIR|synthetic`` keeps images of patients out of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastadapt.errors import InputError, counted, first_line
from fastadapt.files import write_tensors

from ..graph_input import GraphInput, Inputs
from ..tasks import Task
from .manifest import GOLDEN
from .samples import LONGEST_SIDE

EXPECTED, EXPECTED_FEATURES = "expected", "expected_features"
IMAGES = "golden"  # the folder in a bundle
# Filters of other versions of Pillow round to the next level.
TOLERANCE = 2


@dataclass(frozen=True)
class GoldenSamples:
    """The samples that a bundle keeps.

    Attributes:
        images: as decoded, RGB.
        labels: names of their classes, where known.
        inputs: of the graph, before :meth:`GraphInput.array`: images in uint8, and others.
        expected: the trained model's outputs [samples, outputs].
        origin: where the images are from, in words.
        features: the model's features before its head, if they are an output, too.
        tasks: of the model, where it has several.
    """

    images: tuple[Image.Image, ...]
    labels: tuple[str | None, ...]
    inputs: dict[str, Tensor]
    expected: np.ndarray
    origin: str
    features: np.ndarray | None = None
    tasks: tuple[Task, ...] = ()


def write_golden(path: Path, golden: GoldenSamples) -> list[str]:
    """Write ``path``, and the images beside it; return the images' names in the bundle."""
    labels = json.dumps(golden.labels, ensure_ascii=False)
    tensors = {**golden.inputs, **_expected(golden)}
    if golden.features is not None:
        tensors[EXPECTED_FEATURES] = torch.from_numpy(golden.features)
    write_tensors(path, tensors, {"labels": labels})
    (path.parent / IMAGES).mkdir()
    names = [f"{IMAGES}/{index:02d}.png" for index in range(len(golden.images))]
    for name, image in zip(names, golden.images, strict=True):
        pixels = Image.fromarray(np.asarray(image))  # the pixels alone, without metadata
        pixels.save(path.parent / name, "PNG")
    return names


def _expected(golden: GoldenSamples) -> dict[str, Tensor]:
    expected = torch.from_numpy(golden.expected)
    if not golden.tasks:
        return {EXPECTED: expected}
    return {_of(task): expected[:, task.columns].contiguous() for task in golden.tasks}


def _of(task: Task) -> str:
    return f"{EXPECTED}:{task.name}"


def join_expected(tensors: dict[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    """Return golden samples with the tasks' expected outputs side by side, as those of one model.

    Args:
        tensors: what ``golden.safetensors`` holds.
        tasks: of the bundle; nothing is changed where there are none.

    Raises:
        InputError: the outputs of a task are missing, or are no logits of its classes.
    """
    if not tasks:
        return tensors
    rows = set()
    for task in tasks:
        found = tensors.get(_of(task))
        right = found is not None and found.dtype == torch.float32 and found.ndim == 2
        if found is None or not right or found.shape[1] != len(task.classes):
            raise InputError(
                f"{GOLDEN} holds no fp32 {_of(task)!r} of {len(task.classes)} classes: copy the "
                "bundle again"
            )
        rows.add(len(found))
    if len(rows) > 1:
        raise InputError(f"{GOLDEN} holds the tasks' outputs of different images: copy it again")
    return {**tensors, EXPECTED: torch.cat([tensors[_of(task)] for task in tasks], dim=1)}


def golden_inputs(
    tensors: dict[str, Any], names: list[str], preprocessing: dict[str, Any]
) -> Inputs:
    """Make the inputs of a bundle's files from its golden samples.

    Args:
        tensors: what ``golden.safetensors`` holds.
        names: of the inputs, images first.
        preprocessing: as the manifest records it.

    Raises:
        InputError: an input, or the expected output, is not among the tensors.
    """
    for name in (*names, EXPECTED):
        if name not in tensors:
            raise InputError(f"{GOLDEN} lacks the model's input {name!r}: export the run again")
    count = len(tensors[EXPECTED])
    for name in names:
        if len(tensors[name]) != count or not count:
            raise InputError(
                f"{GOLDEN} has {counted(len(tensors[name]), 'row')} of {name!r} and {count} of "
                f"{EXPECTED!r}: copy the bundle again"
            )
    if tensors[EXPECTED].dtype != torch.float32 or tensors[EXPECTED].ndim != 2:
        raise InputError(f"{GOLDEN}: {EXPECTED!r} is no fp32 [samples, outputs]: copy it again")
    images, *others = names
    if any(tensors[name].dtype != torch.float32 for name in others):
        raise InputError(f"{GOLDEN}: an input beside the images is not fp32: copy it again")
    if tensors[images].dtype != torch.uint8 or tensors[images].ndim < 4:
        raise InputError(f"{GOLDEN}: {images!r} are no uint8 images: copy it again")
    graph_input = GraphInput.from_dict(preprocessing)
    return {
        images: graph_input.array(tensors[images].numpy()),
        **{name: tensors[name].numpy() for name in others},
    }


def golden_features(tensors: dict[str, Any], outputs: list[dict[str, Any]]) -> np.ndarray | None:
    """Return the expected features, fp32 [samples, dim], of a bundle with such an output.

    Args:
        tensors: what ``golden.safetensors`` holds.
        outputs: of the model, as the manifest describes them.

    Raises:
        InputError: the tensor is missing, or has another dtype or number of rows.
    """
    if len(outputs) < 2:
        return None
    found, count = tensors.get(EXPECTED_FEATURES), len(tensors[EXPECTED])
    if found is None or found.dtype != torch.float32 or found.ndim != 2 or len(found) != count:
        raise InputError(
            f"{GOLDEN} holds no fp32 {EXPECTED_FEATURES!r} of {count} samples: copy the bundle "
            "again"
        )
    return found.numpy()


def check_golden_pixels(
    bundle: Path, manifest: dict[str, Any], stored: Tensor, same_versions: bool
) -> str | None:
    """Preprocess the golden images anew and compare with what was made of them at export.

    Args:
        bundle: the folder.
        manifest: of the bundle.
        stored: uint8 [samples, 3, H, W], from ``golden.safetensors``.
        same_versions: Pillow and timm are those that the bundle was made with; then every pixel
            must be the same.

    Returns:
        A note, where pixels differ as other versions' filters may round; else ``None``.

    Raises:
        InputError: the pixels differ by more: size, crop or filter are not those of the export.
    """
    names = manifest.get("golden", {}).get("images", ())
    if not names:
        return None
    graph_input = GraphInput.from_dict(manifest["preprocessing"])
    if len(names) != len(stored):
        raise InputError(f"{bundle} has {len(names)} golden images and {len(stored)} inputs")
    largest = 0
    for name, want in zip(names, stored, strict=True):
        if name not in manifest["files"]:
            raise InputError(f"{bundle}: {name} is not among the listed files")
        pixels = _read_png(bundle / name)
        got = as_given(pixels, graph_input)
        if got.shape != want.shape:
            raise InputError(_differs(bundle, name, f"{list(got.shape)}, not {list(want.shape)}"))
        largest = max(largest, int((got.int() - want.int()).abs().max()))
        if largest > (0 if same_versions else TOLERANCE):
            raise InputError(_differs(bundle, name, f"by {largest} levels"))
    return f"preprocessing differs by {largest} levels, as versions do" if largest else None


def _read_png(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if max(image.size) > LONGEST_SIDE:
                raise ValueError(f"it is {image.size[0]} pixels wide and {image.size[1]} high")
            image.load()
            return image.convert("RGB")
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise InputError(f"{path} is no golden image: {first_line(error)}") from None


def as_given(image: Image.Image, graph_input: GraphInput) -> Tensor:
    """Prepare an RGB image as :meth:`GraphInput.array` takes it: uint8 [3, H, W]."""
    if graph_input.resize:
        return torch.from_numpy(np.array(image)).movedim(-1, 0)
    return graph_input.preprocess.transform(image)


def _differs(bundle: Path, name: str, how: str) -> str:
    return (
        f"{bundle}: preprocessing makes other pixels of {name} than at export ({how}): size, crop "
        "or filter of the manifest are not those of the export"
    )
