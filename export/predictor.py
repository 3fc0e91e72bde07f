"""``fastadapt.export.load``: a bundle as a function of images, in the fastest runtime here.

>>> predict = fa.export.load("bundle")
>>> predict(["a.png", "b.png"]).labels
['crack', 'good']
"""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastadapt.data.decode import decode, to_rgb
from fastadapt.data.decode_pool import Reading, default_workers
from fastadapt.data.pixels import DeepImage, ValueRange, to_eight_bit_rgb
from fastadapt.decision import Decision
from fastadapt.errors import InputError, counted, form

from .artefact import VERIFIED, Artefact
from .bundle.consistency import check_consistency
from .bundle.manifest import check_accepted, check_files, read_manifest
from .bundle.measured import machine, on_cpu, read_rows, speeds_on
from .bundle.trust import why_not_run
from .graph_input import GraphInput
from .predict.decode_ahead import Computed, compute, open_decoder
from .predictions import PredictedImage, Prediction
from .runtimes import OnnxRuntime, Runtime, RuntimeUnavailable, load_runtime
from .tasks import tasks_of

Picture: TypeAlias = str | os.PathLike | Image.Image | np.ndarray | Tensor
BATCH = 32


class Origin(NamedTuple):
    """What a predictor was loaded from, so that another process can load it, too."""

    bundle: str
    file: str
    device: str
    trust: bool


class Predictor:
    """A loaded bundle, called with images; made by :func:`load`.

    Several threads may call it at once. Pickled, it is loaded again where it arrives, so that it
    can be sent to processes that are started ("spawn"); a forked process has to load its own.

    Attributes:
        classes: names in the outputs' order; empty with several tasks.
        decision: how probabilities become classes.
        tasks: with names, classes and decisions, where the bundle has several.
        artefact: the file that runs.
        runtime: that runs it.
        graph_input: the input that it takes.
        others: names of its inputs beside the images.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        artefact: Artefact,
        runtime: Runtime,
        origin: Origin | None = None,
    ):
        self.classes = tuple(manifest["labels"])
        self.decision = Decision.from_dict(manifest.get("decision"), "the bundle's manifest")
        self.tasks = tasks_of(manifest)
        self.graph_input = GraphInput.from_dict(manifest["preprocessing"])
        self.artefact = artefact
        self.runtime = runtime
        self.others = tuple(value["name"] for value in manifest["model"]["inputs"][1:])
        self._outputs = manifest["model"].get("outputs", [])
        sizes = artefact.details.get("batch") or {"min": 1, "max": BATCH}
        self._fewest, self._most = sizes["min"], sizes["max"]
        self._origin, self._pid = origin, os.getpid()
        # ONNX Runtime's sessions are safe from several threads; the others' contexts are not.
        safe = isinstance(runtime, OnnxRuntime)
        self._one_at_a_time: Any = nullcontext() if safe else threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Load the bundle again where the pickle is read."""
        if self._origin is None:
            raise InputError("this predictor cannot be sent to another process: load() makes one")
        return _load_again, (self._origin,)

    @property
    def reading(self) -> Reading | None:
        """How an image file becomes the pixels that :meth:`run` takes.

        ``None`` where the graph resizes: images keep their sizes.
        """
        preprocess = self.graph_input.preprocess
        if self.graph_input.resize:
            return None
        return Reading(preprocess.geometry, preprocess.intensity_range)

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """Map prepared images, uint8 [images, H, W, 3], to fp32 logits [images, classes].

        Those of several tasks stand side by side.

        Raises:
            InputError: the model takes more than images, or the process is a fork of the one that
                loaded it.
        """
        return self._run_outputs(pixels, 1)[0]

    def run_features(self, pixels: np.ndarray) -> np.ndarray:
        """Map prepared images to their features before the head, [images, num_features].

        Raises:
            InputError: as for :meth:`run`; or the bundle was exported without features.
        """
        self._check_features()
        return self._run_outputs(pixels, 2)[1]

    def run_with_features(self, pixels: np.ndarray) -> np.ndarray:
        """Map prepared images to logits and features, [images, classes + num_features].

        Raises:
            InputError: as for :meth:`run_features`.
        """
        self._check_features()
        return np.concatenate(self._run_outputs(pixels, 2), axis=1)

    def _check_features(self) -> None:
        if not self.num_features:
            raise InputError(
                "this bundle has no output of features: export it with `with_features=True`"
            )

    def _run_outputs(self, pixels: np.ndarray, count: int) -> list[np.ndarray]:
        self._check_others({}, len(pixels))
        images = np.moveaxis(pixels, -1, 1)
        starts = range(0, len(images), self._most)
        parts = [self._run_all(images[i : i + self._most], []) for i in starts]
        return [np.concatenate([part[i] for part in parts]) for i in range(count)]

    def iter(
        self,
        paths: Iterable[str | os.PathLike],
        batch: int = BATCH,
        workers: int | None = None,
    ) -> Iterator[PredictedImage]:
        """Predict any number of image files, in order and in bounded memory.

        Files are decoded in processes, a few batches ahead of the model. A file that cannot be read
        gives a result that says why, and the others are predicted all the same.

        Args:
            paths: any iterable, an endless one for example.
            batch: images that are computed at once.
            workers: processes that decode; one for each core if ``None``.

        Yields:
            One result for each path.
        """
        if batch < 1:
            raise InputError(f"batch is {batch}; expected at least 1")
        if isinstance(paths, str | bytes | os.PathLike):  # a text would be taken letter by letter
            raise InputError(
                f"paths is {os.fsdecode(paths)!r}, a single path; expected several: give a list, "
                "of a folder sorted(Path(folder).rglob('*.jpg')) for one"
            )
        preprocess = self.graph_input.preprocess
        workers = default_workers() if workers is None else workers
        source = iter(paths)
        sent: deque[list[str | os.PathLike]] = deque()

        def batches() -> Iterator[list[str]]:
            while chunk := list(itertools.islice(source, batch)):
                sent.append(chunk)
                yield [os.fsdecode(path) for path in chunk]

        with open_decoder(self.reading, preprocess.intensity_range, batch, workers) as decode:
            for decoded in decode(batches()):
                yield from self._listed_results(
                    sent.popleft(), compute(decoded, self.run, self.width)
                )

    def _listed_results(
        self, paths: list[str | os.PathLike], computed: Computed
    ) -> Iterator[PredictedImage]:
        whole = Prediction(computed.values, self.classes, self.decision, self.tasks)
        readable = [p for place, p in enumerate(paths) if place not in computed.problems]
        found = _images(readable, whole)
        for place, path in enumerate(paths):
            problem = computed.problems.get(place)
            yield next(found) if problem is None else PredictedImage(path, problem=problem)

    @property
    def width(self) -> int:
        """The number of outputs: classes (of all tasks), or features where there is no head."""
        if self.tasks:
            return self.tasks[-1].columns.stop
        return len(self.classes) or int(np.prod(self._outputs[0]["shape"][1:]))

    @property
    def num_features(self) -> int:
        """The width of the second output, features; 0 if the bundle was exported without."""
        second = [] if self.tasks else self._outputs[1:2]
        return int(np.prod(second[0]["shape"][1:])) if second else 0

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
        return Prediction(logits.astype(np.float32), self.classes, self.decision, self.tasks)

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
                raise InputError(
                    f"{name} has {counted(len(values), 'row')}; there {form(count, 'is', 'are')} "
                    f"{counted(count, 'image')}"
                )

    def _run(self, pixels: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
        return self._run_all(pixels, others)[0]

    def _run_all(self, pixels: np.ndarray, others: list[np.ndarray]) -> list[np.ndarray]:
        if os.getpid() != self._pid:
            raise InputError(
                "this predictor was loaded before the process forked, where its runtime does not "
                "work: load it in each worker, or start workers by multiprocessing's 'spawn'"
            )
        count = len(pixels)
        inputs = [self.graph_input.array(pixels), *others]
        if count < self._fewest:  # an engine that takes no fewer
            inputs = [np.resize(x, (self._fewest, *x.shape[1:])) for x in inputs]
        with self._one_at_a_time:
            outputs = self.runtime.outputs(*inputs)
        rows = [output.reshape(len(output), -1)[:count] for output in outputs]
        return [np.concatenate(rows, axis=1)] if self.tasks else rows


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
        file: the name of the file to run. If ``None``, the fastest of those that were verified and
            run here: on this machine or one of its kind, if any was measured there
            (``fastadapt verify --measure``), else where the bundle was made.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``: a GPU if there is one.
        check: compare every file with its hash first, and the parts with each other.
        trust: run native code (.pt2, engines) and programs (.pte, .tflite, .mlpackage) of a bundle
            not made on this machine.

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
        return Predictor(
            manifest, artefact, runtime, Origin(str(bundle.absolute()), file, device, trust)
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    here = speeds_on(read_rows(bundle, manifest), machine(on_gpu))
    reasons = []
    for artefact in sorted(
        artefacts, key=lambda a: (-here.get(str(a.path), 0.0), -_speed(a, on_gpu))
    ):
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
        origin = Origin(str(bundle.absolute()), artefact.path, device, trust)
        return Predictor(manifest, artefact, runtime, origin)
    if not reasons:
        raise InputError(f"nothing in {bundle} was verified: fastadapt verify says more")
    raise InputError(f"nothing in {bundle} runs here: {'; '.join(reasons)}")


def _images(paths: Sequence[str | os.PathLike], found: Prediction) -> Iterator[PredictedImage]:
    """Yield what a prediction, of one model or of several tasks, says of each image."""
    if found.tasks:
        names = [task.name for task in found.tasks]
        for path, *each in zip(paths, *(_images(paths, found[n]) for n in names), strict=True):
            yield PredictedImage(path, tasks=dict(zip(names, each, strict=True)))
        return
    rows = zip(paths, found.labels, found.probabilities, found.logits, strict=True)
    for row in rows:
        yield PredictedImage(*row)


def _load_again(origin: Origin) -> Predictor:
    return load(origin.bundle, origin.file, device=origin.device, trust=origin.trust)


def _speed(artefact: Artefact, on_gpu: bool) -> float:
    """Return images per second where the bundle was made, on a GPU or on the CPU."""
    speeds = [
        max(by_batch.values(), default=0.0)
        for runtime, by_batch in artefact.speed.items()
        if on_cpu(runtime) != on_gpu
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
