"""Fastadapt's own runtime: a folded model to fused operations, in half precision.

The file is safetensors with a JSON file beside it (:mod:`fastadapt.export.fused.model`); running it
needs this package, PyTorch and, on a GPU, Triton. On a GPU whole batches are captured in a CUDA
graph for each batch size. On a CPU, and where a GPU has no kernels, the operations' plain PyTorch
formulations stand for them, and the runtime's name says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadapt import __version__
from fastadapt.errors import InputError
from fastadapt.files import write_json
from fastadapt.kernels.common.dispatch import why_not_device

from ..fused import model as fused_model
from ..fused.convert import fuse
from ..graph_input import Deployed
from ..settings import DEFAULT_BATCHES, Batches

SUFFIX = "safetensors"
FORMAT = 1  # of the JSON file


def build_fused(
    deployed: nn.Module,
    path: str | Path,
    batch: Batches = DEFAULT_BATCHES,
    *,
    precision: str = "bf16",
) -> dict[str, Any]:
    """Write ``path``, the tensors, and ``path`` + ``.json``, the operations.

    Args:
        deployed: a :class:`~fastadapt.export.graph_input.Deployed` folded model in fp32, that takes
            uint8 images.
        path: ends in ``.safetensors``.
        batch: the batch sizes that the file is compared for; it takes others, too.
        precision: of the products, ``"bf16"`` or ``"fp16"``.

    Returns:
        The manifest's details: all of the ``.json`` but the operations.

    Raises:
        InputError: the model has no fused form, with the reason.
    """
    path = Path(path)
    if not isinstance(deployed, Deployed):
        raise InputError("`fused` takes a folded model with its graph's input before it")
    model = fuse(deployed, fused_model.PRECISIONS[precision])
    details = {
        "library": "fastadapt",
        "version": __version__,
        "format": FORMAT,
        "precision": precision,
        "batch": batch.to_dict(),
        "targets": ["cuda", "cpu"],
        "inputs": [{"dtype": "uint8", "shape": ["batch", *model.size, 3]}],
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
