"""``fastadapt.export.load``: a bundle as a function of images, in the fastest runtime here.

>>> predict = fa.export.load("bundle")
>>> predict(["a.png", "b.png"]).labels
['crack', 'good']
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastadapt.data.decode import decode, to_rgb
from fastadapt.data.pixels import DeepImage, ValueRange, to_eight_bit_rgb
from fastadapt.errors import InputError

from .artefact import VERIFIED, Artefact
from .bundle.consistency import check_consistency
from .bundle.manifest import check_accepted, check_files, read_manifest
from .bundle.trust import why_not_run
from .graph_input import GraphInput
from .runtimes import Runtime, RuntimeUnavailable, load_runtime

Picture: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | Tensor
BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """A model's outputs for some images.

    Attributes:
        logits: fp32 [images, classes]; features, if the model has no head.
        classes: names in the outputs' order; empty without a head.
    """

    logits: np.ndarray
    classes: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The most likely class of every image; empty strings without a head."""
        if not self.classes:
            return [""] * len(self.logits)
        return [self.classes[index] for index in self.logits.argmax(axis=1)]

    @property
    def probabilities(self) -> np.ndarray:
        """The softmax of the logits [images, classes]."""
        powers = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def __len__(self) -> int:
        return len(self.logits)


class Predictor:
    """A loaded bundle, called with images; made by :func:`load`.

    Attributes:
        classes: names in the outputs' order.
        artefact: the file that runs.
        runtime: that runs it.
        graph_input: the input that it takes.
        others: names of its inputs beside the images.
    """

    def __init__(self, manifest: dict[str, Any], artefact: Artefact, runtime: Runtime):
        self.classes = tuple(manifest["labels"])
        self.graph_input = GraphInput.from_dict(manifest["preprocessing"])
        self.artefact = artefact
        self.runtime = runtime
        self.others = tuple(value["name"] for value in manifest["model"]["inputs"][1:])
        sizes = artefact.details.get("batch") or {"min": 1, "max": BATCH}
        self._fewest, self._most = sizes["min"], sizes["max"]

    def __call__(self, images: Picture | Sequence[Picture], **others: np.ndarray) -> Prediction:
        """Predict, with the preprocessing of the training.

        Args:
            images: one or many, of any size: paths, PIL images, uint8 RGB arrays [H, W, 3] or
                uint8 RGB tensors [3, H, W]; or an array [B, H, W, 3] or tensor [B, 3, H, W]. Arrays
                of 16-bit images, uint16 or int16, may be [H, W], too. All values are as decoded.
            **others: further inputs of the model, by name: fp32 arrays [images, ...]
                (``domain_features``, where a GDPL model's encoder was left out).

        Raises:
            InputError: an image cannot be read, or is of another type; an input is missing.
        """
        pixels = [self._pixels(image) for image in self._listed(images)]
        if not pixels:
            raise InputError("there are no images to predict")
        self._check_others(others, len(pixels))
        outputs: dict[int, np.ndarray] = {}
        shapes = sorted({p.shape for p in pixels})  # one, unless the graph resizes
        for shape in shapes:
            indices = [i for i, p in enumerate(pixels) if p.shape == shape]
            for start in range(0, len(indices), self._most):
                part = indices[start : start + self._most]
                further = [np.asarray(others[name], np.float32)[part] for name in self.others]
                rows = self._run(np.stack([pixels[i] for i in part]), further)
                for index, row in zip(part, rows, strict=True):
                    outputs[index] = row
        logits = np.stack([outputs[i] for i in range(len(pixels))])
        return Prediction(logits.astype(np.float32), self.classes)

    def _listed(self, images: Picture | Sequence[Picture]) -> list[Image.Image]:
        """Convert one or many pictures to RGB images."""
        if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
            pictures: list[Picture] = list(images)
        elif isinstance(images, Sequence) and not isinstance(images, str | bytes):
            pictures = list(images)
        else:
            pictures = [images]
        intensity_range = self.graph_input.preprocess.intensity_range
        return [_image(picture, intensity_range) for picture in pictures]

    def _pixels(self, image: Image.Image) -> np.ndarray:
        """Convert an image to uint8 [3, H, W] for :meth:`GraphInput.array`."""
        if self.graph_input.resize:
            return np.moveaxis(np.asarray(image), -1, 0)
        return self.graph_input.preprocess.transform(image).numpy()

    def _check_others(self, others: dict[str, np.ndarray], count: int) -> None:
        if set(others) != set(self.others):
            wanted = " and ".join(self.others) or "nothing"
            raise InputError(
                f"beside images the model takes {wanted}; given: {', '.join(others) or 'nothing'}"
            )
        for name, values in others.items():
            if len(values) != count:
                raise InputError(f"{name} has {len(values)} rows; there are {count} images")

    def _run(self, pixels: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
        count = len(pixels)
        inputs = [self.graph_input.array(pixels), *others]
        if count < self._fewest:  # an engine that takes no fewer
            inputs = [np.resize(x, (self._fewest, *x.shape[1:])) for x in inputs]
        outputs = self.runtime(*inputs)
        return outputs.reshape(len(outputs), -1)[:count]


def load(
    bundle: str | Path,
    file: str | None = None,
    *,
    device: str = "auto",
    check: bool = True,
    trust: bool = False,
) -> Predictor:
    """Load a bundle for local use.

    Args:
        bundle: a folder that ``fastadapt export`` wrote.
        file: the name of the file to run. If ``None``, the one that was fastest where the bundle
            was made, of those that were verified and run here.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``: a GPU if there is one.
        check: compare every file with its hash first, and the parts with each other.
        trust: run native code (.pt2, engines) of a bundle that was not made on this machine.

    Returns:
        A function of images.

    Raises:
        InputError: the bundle is damaged or rejected, has no such file, or nothing in it runs
            here.
    """
    bundle = Path(bundle)
    manifest = read_manifest(bundle)
    check_accepted(bundle, manifest)
    check_files(bundle, manifest, hashes=check)
    if check:
        check_consistency(bundle, manifest)
    artefacts = [Artefact.from_dict(row) for row in manifest["artefacts"]]
    if file is not None:
        artefact = next((a for a in artefacts if a.path == file), None)
        if artefact is None:
            known = ", ".join(a.path for a in artefacts if a.path)
            raise InputError(f"{bundle} holds no {file} to run; it has {known}")
        why_not = why_not_run(artefact, manifest, trust)
        if why_not is not None:
            raise InputError(why_not)
        runtime = load_runtime(bundle / file, artefact.kind, device=device)
        return Predictor(manifest, artefact, runtime)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    reasons = []
    for artefact in sorted(artefacts, key=lambda a: -_speed(a, on_gpu)):
        if artefact.path is None or artefact.status != VERIFIED:
            continue
        why_not = why_not_run(artefact, manifest, trust)
        if why_not is not None:
            reasons.append(why_not)
            continue
        try:
            runtime = load_runtime(bundle / artefact.path, artefact.kind, device=device)
        except RuntimeUnavailable as error:
            reasons.append(str(error))
            continue
        return Predictor(manifest, artefact, runtime)
    if not reasons:
        raise InputError(f"nothing in {bundle} was verified: fastadapt verify says more")
    raise InputError(f"nothing in {bundle} runs here: {'; '.join(reasons)}")


def _speed(artefact: Artefact, on_gpu: bool) -> float:
    """Return images per second where the bundle was made, on a GPU or on the CPU."""
    speeds = [
        max(by_batch.values(), default=0.0)
        for runtime, by_batch in artefact.speed.items()
        if runtime.endswith("CPU") != on_gpu
    ]
    return max(speeds, default=0.0)


def _image(image: Picture, intensity_range: ValueRange | None) -> Image.Image:
    """Convert a picture to RGB, with the values of the range as black and white."""
    if isinstance(image, str | os.PathLike):
        decoded = decode(image)
        for kind in decoded.dropped:
            warnings.warn(f"{image} loses {kind} when it is read", stacklevel=5)
        return to_eight_bit_rgb(decoded.image, intensity_range, str(image))
    if isinstance(image, Image.Image):
        return to_rgb(image, intensity_range)
    if isinstance(image, Tensor):
        _check_array(image.dtype == torch.uint8, image, 0, "tensor [3, H, W]")
        image = image.movedim(0, -1).contiguous().cpu().numpy()
    if isinstance(image, np.ndarray) and image.dtype in (np.uint16, np.int16):
        if image.ndim != 2:
            _check_array(True, image, -1, "array [H, W, 3]")
        return to_eight_bit_rgb(DeepImage(image, 16), intensity_range, "the image")
    if isinstance(image, np.ndarray):
        _check_array(image.dtype == np.uint8, image, -1, "array [H, W, 3]")
        return to_rgb(Image.fromarray(np.ascontiguousarray(image)), intensity_range)
    raise InputError(
        f"an image is a {type(image).__name__}; expected a path, a PIL image, a uint8 array or a "
        "uint8 tensor"
    )


def _check_array(right_dtype: bool, image: np.ndarray | Tensor, channels: int, wanted: str) -> None:
    if not right_dtype or image.ndim != 3 or image.shape[channels] != 3:
        raise InputError(
            f"an image is {image.dtype} {list(image.shape)}; expected a uint8 RGB {wanted}, as "
            "decoded: neither scaled nor normalised"
        )
