"""Compile the kernels that a run will launch before it launches any, all in parallel.

What a backbone's layers launch follows from its modules. Adapter and head are called once for each
kind of step to come, with launches that only begin to compile; their other operators compute on
memory as it is, on the GPU, and nobody reads the results.

A file in Triton's cache marks what was compiled, so that later runs do nothing of it: looking all
kernels up takes a second, most of it under Python's lock. With the cache the mark goes, too.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import os
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastadapt.kernels
from fastadapt._version import __version__
from fastadapt.adapted_model import AdaptedModel
from fastadapt.fusion.compile_image_operators import compile_image_operators
from fastadapt.kernels.common.dispatch import why_not_device
from fastadapt.train.config import TrainConfig
from fastadapt.train.loop import EVALUATION_BATCH_SIZE


class Call(NamedTuple):
    """A kind of step, as adapter and head see it.

    Attributes:
        rows: of the batch.
        dtype: of the features.
        training: whether there is a backward.
        from_backbone: whether the features need a gradient.
    """

    rows: int
    dtype: torch.dtype
    training: bool
    from_backbone: bool


def begin_kernels(
    model: AdaptedModel,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    cached: bool,
) -> threading.Thread | None:
    """Compile in threads what a run will launch; return one that waits for all of them.

    Args:
        model: on any device; it is read, not changed.
        config: of the run.
        device: where it will run.
        dtype: autocast's; ``None`` without.
        cached: whether stage 1 trains on cached features.

    Returns:
        The thread, to be joined before anything is launched; ``None`` where nothing is compiled
        ahead: on a CPU, and in full precision.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    calls = calls_of(config, dtype, cached)
    thread = threading.Thread(
        target=_compile, args=(model, calls, device, dtype), name="fastadapt kernels", daemon=True
    )
    thread.start()
    return thread


def calls_of(config: TrainConfig, dtype: torch.dtype, cached: bool) -> list[Call]:
    """Return the kinds of steps that a run will take."""
    found = []
    for stage in range(1, config.stages + 1):
        _, _, rows = config.of_stage(stage)
        trains = stage == 2 or config.full
        kept = torch.float32 if config.feature_dtype == "fp32" else torch.float16
        given = kept if cached and stage == 1 else dtype
        found.append(Call(rows, given, True, trains))
        found.append(Call(max(rows, EVALUATION_BATCH_SIZE), given, False, False))
    return found


def _compile(
    model: AdaptedModel, calls: list[Call], device: torch.device, dtype: torch.dtype
) -> None:
    # What fails here is compiled, or fails and is told, at its launch.
    with contextlib.suppress(Exception), torch.cuda.device(device):
        if why_not_device(torch.empty(0, device=device)) is not None:
            return
        mark = mark_of(model, calls, device, dtype)
        if mark.exists():
            return
        from fastadapt.kernels.common.launcher import begun, compiling_only

        trains = any(call.from_backbone for call in calls)
        threads = compile_image_operators(model.backbone, dtype, trains)
        with contextlib.suppress(Exception), compiling_only():
            call_adapter(model, calls, device, dtype)
        for thread in (*begun(), *threads):
            thread.join()
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def mark_of(
    model: AdaptedModel, calls: list[Call], device: torch.device, dtype: torch.dtype
) -> Path:
    """Return the file in Triton's cache that says that all of this was compiled.

    It is another one for other modules, steps, versions, kernels or GPUs.
    """
    folder = os.environ.get("TRITON_CACHE_DIR")
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    cache = Path(folder) if folder else home / ".triton" / "cache"
    sources = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(Path(fastadapt.kernels.__file__).parent.rglob("*.py"))
    ]
    made_of = (
        repr(model),
        model.spec,
        calls,
        dtype,
        torch.cuda.get_device_name(device),
        (__version__, torch.__version__, importlib.metadata.version("triton")),
        sources,
    )
    return cache / f"fastadapt-{hashlib.sha256(repr(made_of).encode()).hexdigest()}"


def call_adapter(
    model: AdaptedModel, calls: list[Call], device: torch.device, dtype: torch.dtype
) -> None:
    """Run copies of a model's adapter and head on the device, forward and backward.

    No gradient is kept, and random numbers are drawn as if it had not run.
    """
    if isinstance(model.adapter, nn.Identity):
        return
    copied = copy.deepcopy(model, {id(model.backbone): model.backbone})  # which is not called
    parts = (copied.adapter.to(device), copied.head.to(device))
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.autocast(device.type, dtype),
        torch.autograd.set_multithreading_enabled(False),
    ):
        for call in calls:
            for part in parts:
                part.train(call.training)
            x = _features(model, call, device)
            with torch.set_grad_enabled(call.training):
                y = copied.classify_features(x).float().sum()
            if call.training:
                inputs = [*trained, *([x] if call.from_backbone else [])]
                torch.autograd.grad(y, inputs, allow_unused=True)


def _features(model: AdaptedModel, call: Call, device: torch.device) -> Tensor:
    """Make features in the backbone's layout, all positions in a row."""
    spec = model.spec
    tokens = spec.num_tokens
    x = torch.empty(call.rows, tokens, spec.dim, dtype=call.dtype, device=device)
    if spec.layout == "channels_first":
        x = x.transpose(1, 2).unflatten(2, (tokens, 1))
    elif spec.layout == "channels_last":
        x = x.unflatten(1, (tokens, 1))
    return x.requires_grad_(call.from_backbone)
