"""Compute the frozen backbone's features of a split once, and keep them in a file.

The name of the file (:mod:`fastadapt.train.cache_file`) is a hash of everything that the features
depend on. It may be deleted at any time while no training runs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from fastadapt.adapted_model import AdaptedModel
from fastadapt.cuda_graph import GraphedStep
from fastadapt.data.images import DEVICE_SHARE, ImageSource
from fastadapt.errors import InputError, counted
from fastadapt.files import sha256_tensors
from fastadapt.fusion.batch_norm import fuse_batch_norms
from fastadapt.fusion.cpu_activations import fuse_activations
from fastadapt.fusion.frozen_blocks import release_fused_blocks
from fastadapt.train.backbone_code import describe_code
from fastadapt.train.cache_file import open_cache, writing
from fastadapt.train.halving import InParts
from fastadapt.train.sources import FeatureSource, padded
from fastadapt.trainable import COMPILED
from fastadapt.unplanned import unplanned

FORMAT_VERSION = 2  # of the cache: raised when what is stored changes
_DTYPES = {"auto": ("float16", "float32"), "fp16": ("float16",), "fp32": ("float32",)}
CPU_BATCH_SIZE = 16  # at most: of the frozen backbone; larger batches fall out of the caches
GPU_BATCH_SIZE = 64


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


@dataclass(frozen=True)
class FeatureShape:
    """The shape of a backbone's features.

    Attributes:
        tokens: positions that are kept; 1 where only their mean is used.
        dim: channels.
        spatial: the shape that the layout gives the positions; empty for tokens.
    """

    tokens: int
    dim: int
    spatial: tuple[int, ...]


def cached_source(
    model: AdaptedModel,
    images: ImageSource,
    folder: Path,
    settings: CacheSettings,
    progress: Progress,
    autocast: Callable[[], AbstractContextManager],
    name: str = "features",
    writers: list[CacheWriter] | None = None,
    extraction: Extraction | None = None,
) -> FeatureSource:
    """Return the features of a split, from the cache in ``folder`` or computed into it.

    On a GPU with room for them they stay there, and the file is written by another thread.

    Args:
        model: its backbone must be frozen and without low-rank adapters.
        images: the split; its ``augment`` and ``seed`` are those of ``settings``.
        folder: of the cache, made if need be.
        settings: see :class:`CacheSettings`.
        progress: shows images per second and the time left.
        autocast: makes the context that the backbone runs in.
        name: of the split, for the progress bar.
        writers: where threads that still write are put; without it, this waits for them.
        extraction: of the same model, where other splits use it as well; the caller closes it.

    Raises:
        InputError: the features do not fit on the disk, or are not finite.
        OSError: the disk got full; the unfinished file is removed.
    """
    path = folder.absolute() / f"{cache_key(model, images, settings)}.npy"
    shape = _shape_of(model, autocast)
    whole = (settings.views, len(images.samples), shape.tokens, shape.dim)
    features: Tensor | np.ndarray | None = open_cache(path, whole, _DTYPES[settings.dtype])
    processes = images.processes
    if not processes.all_true(features is not None):
        features = None  # a process does not see the file: all compute
    if features is None:
        extracted = extraction or Extraction(model, autocast)
        work = _Computation(extracted, images, path, settings, shape, progress, name)
        features = work.run(fp16=settings.dtype != "fp32")
        if features is None and settings.dtype == "fp16":
            raise InputError(
                "the backbone's features exceed fp16's range (65504): use `feature_dtype='fp32'`"
            )
        if features is None:
            features = work.run(fp16=False)
            assert features is not None  # fp32 holds every value
        if isinstance(features, Tensor) and processes.first:
            writer = CacheWriter(path, features)
            if writers is None:
                writer.join()
            else:
                writers.append(writer)
    elif images.device.type == "cuda" and _fits(features.nbytes, images.device):
        features = torch.from_numpy(np.array(features)).to(images.device)
    if extraction is None:
        release_fused_blocks(model.backbone)
    channels_last = model.spec.layout == "channels_last"
    return FeatureSource(features, images.labels, images.device, shape.spatial, channels_last, path)


def backbone_hash(model: AdaptedModel) -> str:
    """Hash all of the backbone's tensors, those that a checkpoint holds, too."""
    state = model.backbone.state_dict()
    return sha256_tensors({name.replace(COMPILED, ""): tensor for name, tensor in state.items()})


def cache_key(model: AdaptedModel, images: ImageSource, settings: CacheSettings) -> str:
    """Return a hash of everything that cached features depend on."""
    function = model.feature_fn
    features = model.config.features
    features = "" if callable(features) else str(features)  # a function's text is its address
    pooled = isinstance(model.adapter, nn.Identity)
    ingredients = {
        "version": FORMAT_VERSION,
        "torch": torch.__version__.split(".")[:2],
        "device": images.device.type,
        "backbone": [model.source.get("name"), backbone_hash(model)],
        "function": [function.__module__, getattr(function, "__qualname__", ""), features],
        "spec": asdict(model.spec),
        "pooled": "token" if model.config.pool == "token" else pooled,
        "preprocess": images.preprocess.to_dict(),
        **asdict(settings),
    }
    if code := describe_code(model):
        ingredients["code"] = code
    if images.decode_on == "gpu":  # whose pixels differ by a value or two
        ingredients["decode"] = images.decode_on
    digest = hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode())
    for sample in images.samples:
        status = sample.path.stat()
        digest.update(f"{sample.path}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


class CacheWriter(threading.Thread):
    """Write features that a GPU holds to a file, while training goes on.

    A full disk costs the cache and not the run: ``problem`` then says what happened.
    """

    def __init__(self, path: Path, features: Tensor):
        super().__init__(name="fastadapt writes features", daemon=True)
        self.path = path
        self.features = features
        self.problem: str | None = None
        self._computed = torch.cuda.Event()
        self._computed.record(torch.cuda.current_stream(features.device))
        self.start()

    def run(self) -> None:
        """Copy slice by slice, on a stream of its own."""
        device = self.features.device
        try:
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
                self._computed.wait()
                with writing(self.path, self.features.shape, self.features.dtype) as file:
                    for view in self.features:
                        for part in view.split(GPU_BATCH_SIZE):
                            file.write(part.cpu())
        except OSError as error:
            self.problem = str(error)


class Extraction:
    """The frozen backbone's features of batches: captured on a GPU, fused on a CPU.

    Args:
        model: its backbone must be frozen.
        autocast: makes the context that the backbone runs in.
        graph: whether to capture; for many batches.
        say: as for :class:`fastadapt.GraphedStep`.
    """

    def __init__(
        self,
        model: AdaptedModel,
        autocast: Callable[[], AbstractContextManager],
        graph: bool = False,
        say: Callable[[str], object] | None = None,
    ):
        self._given, self._autocast = model, autocast
        say = say or (lambda line: None)
        step = GraphedStep(self._tokens, say=say, what="the backbone") if graph else self._tokens
        self._step: InParts | None = InParts(step, say)

    def __call__(self, batch: Tensor) -> Tensor:
        """Return the features [B, tokens, C] fp32 of images [B, C, H, W]."""
        assert self._step is not None, "closed"
        with torch.no_grad():
            return self._step(batch)

    def close(self) -> None:
        """Free the graph, and then the rounded weights that it reads."""
        self._step = None
        release_fused_blocks(self._given.backbone)

    def _tokens(self, batch: Tensor) -> Tensor:
        model = self._model  # made without autocast
        with self._autocast():
            return as_tokens(model, model.backbone_features(batch)).float()

    @cached_property
    def _model(self) -> AdaptedModel:
        on_cpu = next(self._given.backbone.parameters()).device.type == "cpu"
        return _fused(self._given, self._autocast) if on_cpu else self._given


class _Computation:
    """The features of one split, computed batch by batch."""

    def __init__(
        self,
        extraction: Extraction,
        images: ImageSource,
        path: Path,
        settings: CacheSettings,
        shape: FeatureShape,
        progress: Progress,
        name: str,
    ):
        self.extraction, self.images, self.path = extraction, images, path
        self.processes = images.processes
        self.shape = (settings.views, len(images.samples), shape.tokens, shape.dim)
        self.progress, self.name = progress, name

    def run(self, fp16: bool) -> Tensor | np.ndarray | None:
        """Compute every view; return ``None`` if fp16 cannot hold a value.

        Returns:
            [views, samples, tokens, C]: on a GPU with room for it, else mapped from the file.
        """
        dtype = torch.float16 if fp16 else torch.float32
        needed = int(np.prod(self.shape)) * dtype.itemsize
        processes = self.processes
        free = processes.on_first(lambda: _check_space(self.path.parent, needed))
        count = self.shape[0] * self.shape[1]
        self.progress.console.print(
            f"computing features ({self.name}): {counted(count, 'image')}, {size_text(needed)} on "
            "disk "
            f"of {size_text(free)} free"
        )
        task = self.progress.add_task(
            f"features ({self.name})", total=count, unit="images", note=""
        )
        device = self.images.device
        try:
            if processes.all_true(device.type == "cuda" and _fits(needed, device)):
                return self._on_device(dtype, task)
            # Every process sees all features, in the order in which the first one writes them.
            target = writing(self.path, self.shape, dtype) if processes.first else nullcontext()
            with target as file:
                for view in range(self.shape[0]):
                    for first, features in self._batches(view, task):
                        features = features.cpu()
                        stored = features.to(dtype)
                        self._check(stored, features, first)
                        if file is not None:
                            file.write(stored)
            processes.gather(None)  # the file is whole
            return np.load(self.path, mmap_mode="r")
        except _Overflow:
            return None
        finally:
            self.progress.remove_task(task)

    def _on_device(self, dtype: torch.dtype, task) -> Tensor:
        """Fill a tensor on the GPU; look for overflow once, at the end."""
        result = torch.empty(self.shape, dtype=dtype, device=self.images.device)
        bad = torch.zeros((), dtype=torch.bool, device=result.device)
        for view in range(self.shape[0]):
            for first, features in self._batches(view, task):
                stored = features.to(dtype)
                result[view, first : first + len(stored)] = stored
                bad |= stored.isfinite().all().logical_not()
        if bad:
            for view in range(self.shape[0]):
                for first, features in self._batches(view, task):
                    self._check(features.to(dtype), features, first)
        return result

    def _batches(self, view: int, task):
        """Yield where a batch begins, and its features [B, tokens, C] fp32.

        Of several processes each computes a piece of every batch, and all get the whole.
        """
        count = self.shape[1]
        batch_size = GPU_BATCH_SIZE
        if self.images.device.type == "cpu":  # an image a thread
            batch_size = max(2, min(CPU_BATCH_SIZE, torch.get_num_threads()))
        views, first = np.full(count, view), 0
        share = self.processes.share(np.arange(count), batch_size * self.processes.place.size)
        batches = self.images.batches(share.order, views, batch_size)
        for (batch, labels), rows in zip(batches, share.rows, strict=True):
            if batch.is_cuda:  # libraries plan for each size that they meet
                batch, _ = padded(batch, labels, batch_size)
            features = self.extraction(batch)
            if self.shape[2] == 1:
                features = features.mean(1, keepdim=True)
            features = self.processes.gather_rows(features, rows)
            yield first, features
            first += len(features)
            self.progress.advance(task, len(features))

    def _check(self, stored: Tensor, features: Tensor, first: int) -> None:
        """Refuse values that are not finite, or that fp16 cannot hold."""
        if stored.isfinite().all():
            return
        if features.isfinite().all():
            raise _Overflow
        bad = int(features.isfinite().flatten(1).all(1).logical_not().nonzero()[0])
        raise InputError(
            "the backbone gives NaN or infinite features for "
            f"{self.images.samples[first + bad].path}: check its weights"
        )


class _Overflow(Exception):
    pass


def as_tokens(model: AdaptedModel, features: Tensor) -> Tensor:
    """Return features in the backbone's layout as [B, N, C]."""
    if model.spec.layout == "channels_first":
        return features.flatten(2).transpose(1, 2)
    return features.flatten(1, -2)


def size_text(count: int) -> str:
    """Return a number of bytes as people write it."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _fused(model: AdaptedModel, autocast: Callable[[], AbstractContextManager]) -> AdaptedModel:
    """Return a model that computes the same features on a CPU in fewer passes over memory."""
    probe = _probe(model)
    fused = fuse_batch_norms(model, probe)
    with autocast():
        half = torch.is_autocast_enabled("cpu")
    exact = all(parameter.dtype == torch.float32 for parameter in fused.backbone.parameters())
    return fuse_activations(fused, probe) if exact and not half else fused


def _probe(model: AdaptedModel) -> Tensor:
    """Return a batch of one image, of noise: what a backbone computes has its shape."""
    device = next(model.backbone.parameters()).device
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, *model.spec.input_size, generator=generator).to(device)
    return probe.contiguous(memory_format=torch.channels_last)


def _shape_of(model: AdaptedModel, autocast: Callable[[], AbstractContextManager]) -> FeatureShape:
    with torch.inference_mode(), autocast():
        features = unplanned(lambda: model.backbone_features(_probe(model)))
    shape = tuple(features.shape[1:])
    spatial = () if model.spec.layout == "tokens" else shape[:-1]
    if model.spec.layout == "channels_first":
        spatial = shape[1:]
    # Without an adapter only the mean over positions is used, which is far smaller to keep.
    pooled = isinstance(model.adapter, nn.Identity)
    tokens = 1 if pooled else int(np.prod(shape)) // model.spec.dim
    if pooled:
        spatial = tuple(1 for _ in spatial)
    return FeatureShape(tokens, model.spec.dim, spatial)


def _fits(needed: int, device: torch.device) -> bool:
    return needed <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]


def _check_space(folder: Path, needed: int) -> int:
    """Return the free bytes.

    Raises:
        InputError: they are fewer than ``needed``.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the cached features need {size_text(needed)}, but {folder} has "
            f"{size_text(free)} free: give another `out`, fewer `views`, or `cache=False` to "
            "compute them anew in each epoch"
        )
    return free
