"""Fastadapt's own runtime: a folded model to fused operations, in half precision.

The file is safetensors with a JSON file beside it (:mod:`fastadapt.export.fused.model`); running it
needs this package, PyTorch and, on a GPU, Triton. On a GPU whole batches are captured in a CUDA
graph for each batch size. On a CPU, and where a GPU has no kernels, the operations' plain PyTorch
formulations stand for them, and the runtime's name says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import __version__
from fastadapt.errors import InputError
from fastadapt.files import write_json
from fastadapt.kernels.common.dispatch import why_not_device

from ..fused import model as fused_model
from ..fused.convert import fuse
from ..fused.float8 import convertible, hidden_ranges, layers_in_float8, ranked_steps, to_float8
from ..graph_input import Deployed
from ..settings import DEFAULT_BATCHES, Batches

SUFFIX = "safetensors"
FORMAT = 1  # of the JSON file


@dataclass(frozen=True)
class Float8:
    """What a file in FP8 is made of.

    Attributes:
        model: in bf16, where it was calibrated.
        ranges: from :func:`~..fused.float8.hidden_ranges`.
        keep: numbers of the steps that stay in bf16.
    """

    model: fused_model.FusedModel
    ranges: dict[int, float]
    keep: Collection[int] = ()


def calibrate_float8(deployed: Deployed, batches: Iterable[Tensor], device: str) -> Float8:
    """Measure the ranges of the layers that can be in FP8.

    Args:
        deployed: as for :func:`build_fused`.
        batches: uint8 images [B, H, W, 3].
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        InputError: the model has no fused form, with the reason.
    """
    model = fuse(deployed, torch.bfloat16).to(device)
    if not convertible(model):
        return Float8(model, {})
    return Float8(model, hidden_ranges(model, (batch.to(device) for batch in batches)))


class Float8Steps:
    """The steps that can be in FP8, by number, for :func:`~..precision.fallback.keep_layers`.

    Args:
        float8: from :func:`calibrate_float8`.
        images: uint8 [B, H, W, 3] that rank the steps, if it comes to that.
    """

    def __init__(self, float8: Float8, images: Callable[[], Tensor]):
        self._float8, self._images = float8, images
        self.nodes = {str(index): index for index in float8.ranges}

    @functools.cached_property
    def ranked(self) -> list[str]:
        """Steps by what each alone loses in FP8, the most first."""
        model, ranges = self._float8.model, self._float8.ranges
        return [str(index) for index in ranked_steps(model, ranges, self._images())]


def build_fused(
    deployed: nn.Module,
    path: str | Path,
    batch: Batches = DEFAULT_BATCHES,
    *,
    precision: str = "bf16",
    float8: Float8 | None = None,
) -> dict[str, Any]:
    """Write ``path``, the tensors, and ``path`` + ``.json``, the operations.

    Args:
        deployed: a :class:`~fastadapt.export.graph_input.Deployed` folded model in fp32, that takes
            uint8 images.
        path: ends in ``.safetensors``.
        batch: the batch sizes that the file is compared for; it takes others, too.
        precision: of the products, ``"bf16"`` or ``"fp16"``; ``"fp8"``: of some, others in bf16.
        float8: of the same model, for ``"fp8"``.

    Returns:
        The manifest's details: all of the ``.json`` but the operations.

    Raises:
        InputError: the model has no fused form, with the reason.
    """
    path = Path(path)
    if not isinstance(deployed, Deployed):
        raise InputError("`fused` takes a folded model with its graph's input before it")
    notes: dict[str, Any] = {}
    if float8 is None:
        model = fuse(deployed, fused_model.PRECISIONS[precision])
    else:
        model = to_float8(float8.model, float8.ranges, float8.keep)
        notes["fp8_layers"] = layers_in_float8(model, float8.ranges)
    details = {
        "library": "fastadapt",
        "version": __version__,
        "format": FORMAT,
        "precision": precision,
        "batch": batch.to_dict(),
        "targets": ["cuda", "cpu"],
        "inputs": [{"dtype": "uint8", "shape": ["batch", *model.size, 3]}],
        **notes,
    }
    steps = model.save(path)
    write_json(
        path.with_name(f"{path.name}.json"), {**details, "size": list(model.size), "steps": steps}
    )
    return details


def load_fused(
    path: str | Path, details: dict[str, Any], device: str
) -> tuple[fused_model.FusedModel, str]:
    """Read a file onto a device, and name what will compute.

    Args:
        path: the safetensors file.
        details: of the JSON file beside it.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        InputError: the files are damaged or of a newer version.
    """
    if details.get("format") != FORMAT:
        raise InputError(
            f"{Path(path).name} is of format {details.get('format')!r}; this fastadapt reads "
            f"{FORMAT}: update it"
        )
    model = fused_model.load(path, details).to(device)
    reason = why_not_device(torch.empty(0, device=device))
    kind = "fastadapt" if reason is None else "fastadapt (plain PyTorch)"
    return model, f"{kind}, {device.upper()}"
