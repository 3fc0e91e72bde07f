"""What the trainable part is fed with: cached features of the frozen backbone, or images."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.checkpoint import backbone_fingerprint
from fastadapt.data.augment import read_view
from fastadapt.data.dataset import Sample
from fastadapt.data.preprocess import Preprocess
from fastadapt.errors import InputError
from fastadapt.files import atomic_path
from fastadapt.fusion.batch_norm import fuse_batch_norms
from fastadapt.fusion.frozen_blocks import release_fused_blocks
from fastadapt.progress import prefetch

FORMAT_VERSION = 1  # of the cache: raised when what is stored changes
FEATURE_DTYPES = ("auto", "fp16", "fp32")
BATCH_SIZE = 16  # of the frozen backbone; on a CPU larger batches fall out of the caches
GPU_BATCH_SIZE = 64


class Source(Protocol):
    """One split as batches; ``logits`` knows what its batches are."""

    labels: np.ndarray  # [n] int64
    num_views: int | None  # None: a fresh view each epoch

    def batches(
        self, order: np.ndarray, views: np.ndarray | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels [B] on the device, in this order; ``views`` is [n], or None: plain."""

    def logits(self, model: AdaptedModel, inputs: Tensor) -> Tensor:
        """[B, num_classes]."""


class ImageSource:
    """Image files, read and augmented when they are needed.

    Args:
        samples: of one split.
        preprocess: of the images.
        device: where batches go.
        workers: threads that read.
        augment, seed: as for :func:`fastadapt.data.augment.read_view`; a view is decided by the seed,
            the sample's place in ``samples`` and the view's number.
    """

    num_views = None

    def __init__(
        self,
        samples: Sequence[Sample],
        preprocess: Preprocess,
        device: torch.device,
        workers: int,
        augment: str = "none",
        seed: int = 0,
    ):
        self.samples = samples
        self.preprocess = preprocess
        self.device = device
        self.workers = workers
        self.augment = augment
        self.seed = seed
        self.labels = np.array([s.label for s in samples], dtype=np.int64)

    def read(self, index: int, view: int = 0) -> Tensor:
        """uint8 [3, H, W]; view 0 is the plain one."""
        seed = (self.seed, index, view) if view else None
        return read_view(self.samples[index].path, self.preprocess, self.augment, seed)

    def batches(
        self, order: np.ndarray, views: np.ndarray | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        views = np.zeros(len(self.samples), int) if views is None else views
        images = prefetch(
            lambda i: self.read(int(i), int(views[i])), order, self.workers, ahead=2 * batch_size
        )
        for rows in _batches(order, batch_size):
            batch = to_device(torch.stack([next(images) for _ in rows]), self.device)
            batch = self.preprocess.normalize(batch).contiguous(memory_format=torch.channels_last)
            yield batch, to_device(torch.from_numpy(self.labels[rows]), self.device)

    def logits(self, model: AdaptedModel, inputs: Tensor) -> Tensor:
        return model(inputs)


class FeatureSource:
    """Features of the frozen backbone, read from a memory-mapped file.

    Args:
        features: [views, samples, N, C]; fp16 or fp32.
        labels: [samples].
        device: where batches go.
        spatial: the shape that the backbone's layout gives the N tokens; empty for tokens.
        channels_last: whether that layout has the channels last.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        device: torch.device,
        spatial: tuple[int, ...] = (),
        channels_last: bool = False,
    ):
        self.features = features
        self.labels = labels
        self.device = device
        self.spatial = spatial
        self.channels_last = channels_last
        self.num_views = len(features)

    def batches(
        self, order: np.ndarray, views: np.ndarray | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in _batches(order, batch_size):
            chosen = np.zeros(len(rows), int) if views is None else views[rows]
            batch = to_device(torch.from_numpy(self.features[chosen, rows]), self.device)
            if self.spatial and self.channels_last:
                batch = batch.unflatten(1, self.spatial)
            elif self.spatial:
                batch = batch.transpose(1, 2).unflatten(2, self.spatial)
            yield batch, to_device(torch.from_numpy(self.labels[rows]), self.device)

    def logits(self, model: AdaptedModel, inputs: Tensor) -> Tensor:
        return logits_of_cached(model, inputs)


@dataclass(frozen=True)
class CacheSettings:
    """What cached features depend on, beside the backbone and the image files.

    Attributes:
        views: number of views of each image, the plain one first.
        augment: of the other views.
        seed: of the other views.
        dtype: ``"fp16"``, ``"fp32"``, or ``"auto"``: fp16 if every value is finite in it.
        amp: the precision that the backbone computes in (``"off"``: its own).
    """

    views: int = 1
    augment: str = "none"
    seed: int = 0
    dtype: str = "auto"
    amp: str = "off"


def cached_source(
    model: AdaptedModel,
    images: ImageSource,
    folder: Path,
    settings: CacheSettings,
    progress: Progress,
    autocast: Callable[[], AbstractContextManager],
    name: str = "features",
) -> FeatureSource:
    """The features of a split, from the cache in ``folder`` or computed into it.

    The cache is one ``.npy`` file whose name is a hash of everything that the features depend on.
    It may be deleted at any time while no training runs.

    Args:
        model: its backbone must be frozen and without low-rank adapters.
        images: the split; its ``augment`` and ``seed`` are those of ``settings``.
        folder: of the cache, made if need be.
        settings: see :class:`CacheSettings`.
        progress: shows images per second and the time left.
        autocast: makes the context that the backbone runs in.
        name: of the split, for the progress bar.

    Raises:
        InputError: the features do not fit on the disk, or are not finite.
        OSError: the disk got full; the unfinished file is removed.
    """
    path = folder.absolute() / f"{cache_key(model, images, settings)}.npy"
    probe = next(images.batches(np.arange(1), None, 1))[0]
    with torch.inference_mode(), autocast():
        shape = tuple(model.backbone_features(probe).shape[1:])
    spatial = () if model.spec.layout == "tokens" else shape[:-1]
    if model.spec.layout == "channels_first":
        spatial = shape[1:]
    # Without an adapter only the mean over positions is used, which is far smaller to keep.
    pooled = isinstance(model.adapter, nn.Identity)
    tokens = 1 if pooled else int(np.prod(shape)) // model.spec.dim
    if pooled:
        spatial = tuple(1 for _ in spatial)
    features = _open_cache(path)
    if features is None:
        frozen = fuse_batch_norms(model, probe) if images.device.type == "cpu" else model
        full = (settings.views, len(images.samples), tokens, model.spec.dim)
        fp16 = settings.dtype != "fp32"
        if not _write_features(frozen, images, path, full, fp16, progress, autocast, name):
            if settings.dtype == "fp16":
                raise InputError(
                    "the backbone's features exceed fp16's range (65504): use "
                    "`feature_dtype='fp32'`"
                )
            _write_features(frozen, images, path, full, False, progress, autocast, name)
        features = np.load(path, mmap_mode="r")
    release_fused_blocks(model.backbone)
    return FeatureSource(
        features, images.labels, images.device, spatial, model.spec.layout == "channels_last"
    )


def cache_key(model: AdaptedModel, images: ImageSource, settings: CacheSettings) -> str:
    """A hash of everything that cached features depend on."""
    function = model.feature_fn
    ingredients = {
        "version": FORMAT_VERSION,
        "torch": torch.__version__.split(".")[:2],
        "device": images.device.type,
        "backbone": [model.source.get("name"), backbone_fingerprint(model)],
        "function": [function.__module__, function.__qualname__, str(model.config.features)],
        "spec": asdict(model.spec),
        "pooled": isinstance(model.adapter, nn.Identity),
        "preprocess": images.preprocess.to_dict(),
        **asdict(settings),
    }
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode())
    for sample in images.samples:
        status = sample.path.stat()
        digest.update(f"{sample.path}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def _open_cache(path: Path) -> np.ndarray | None:
    """The mapped file; None if it is not there, or damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        path.unlink(missing_ok=True)
        return None


def _write_features(
    model: AdaptedModel,
    images: ImageSource,
    path: Path,
    shape: tuple[int, ...],
    fp16: bool,
    progress: Progress,
    autocast: Callable[[], AbstractContextManager],
    name: str,
) -> bool:
    """Computes and writes every view; False if fp16 cannot hold a value."""
    views, count, tokens, dim = shape
    dtype = torch.float16 if fp16 else torch.float32
    needed = views * count * tokens * dim * dtype.itemsize
    free = _check_space(path.parent, needed)
    progress.console.print(
        f"computing features ({name}): {views * count} images, {_size(needed)} on disk "
        f"of {_size(free)} free"
    )
    batch_size = BATCH_SIZE if images.device.type == "cpu" else GPU_BATCH_SIZE
    order = np.arange(count)
    task = progress.add_task(f"features ({name})", total=views * count, unit="images", note="")
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            header = {"shape": shape, "fortran_order": False}
            header["descr"] = np.lib.format.dtype_to_descr(np.dtype("f2" if fp16 else "f4"))
            np.lib.format.write_array_header_1_0(file, header)
            for view in range(views):
                numbers = np.full(count, view)
                for start, (batch, _) in enumerate(images.batches(order, numbers, batch_size)):
                    with torch.inference_mode(), autocast():
                        features = as_tokens(model, model.backbone_features(batch)).float()
                    if tokens == 1:
                        features = features.mean(1, keepdim=True)
                    features = features.cpu()
                    stored = features.to(dtype)
                    if not stored.isfinite().all():
                        if features.isfinite().all():
                            raise _Overflow
                        bad = int(features.isfinite().flatten(1).all(1).logical_not().nonzero()[0])
                        raise InputError(
                            "the backbone gives NaN or infinite features for "
                            f"{images.samples[start * batch_size + bad].path}: check its weights"
                        )
                    file.write(stored.contiguous().numpy().data)
                    progress.advance(task, len(batch))
        return True
    except _Overflow:
        return False
    finally:
        progress.remove_task(task)


class _Overflow(Exception):
    pass


def logits_of_cached(model: AdaptedModel, features: Tensor) -> Tensor:
    """[B, num_classes] of features as the cache keeps them, in the backbone's layout."""
    # Autocast's norms take any dtype on a GPU, where ours read fp16 as it is.
    if not (features.is_cuda and torch.is_autocast_enabled("cuda")):
        features = features.to(next(model.head.parameters()).dtype)
    return model.classify_features(features)


def as_tokens(model: AdaptedModel, features: Tensor) -> Tensor:
    """Features in the backbone's layout to [B, N, C]."""
    if model.spec.layout == "channels_first":
        return features.flatten(2).transpose(1, 2)
    return features.flatten(1, -2)


def _check_space(folder: Path, needed: int) -> int:
    """Free bytes. Raises InputError if they are fewer than ``needed``."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the cached features need {_size(needed)}, but {folder} has "
            f"{_size(free)} free: give another `out`, fewer `views`, or `cache=False` to "
            "compute them anew in each epoch"
        )
    return free


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _batches(order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
