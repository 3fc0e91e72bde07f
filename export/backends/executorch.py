"""ExecuTorch: a folded model as a .pte program, for phones, boards and CPUs.

PyTorch exports the model, and ExecuTorch's partitioner gives XNNPACK all that it can compute; what
it cannot (LayerNorm, for one) ExecuTorch's portable operators do. The batch is dynamic between the
smallest and the largest size; memory is planned for the largest when the file is written.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError, first_line
from fastadapt.files import atomic_path

from ..graph_input import BATCH
from ..settings import Batches
from .tracing import dynamic_shapes, plain_attention, plainer, quiet

SUFFIX = "pte"
METHOD = "forward"


def load_executorch(threads: int) -> Any:
    """Import ExecuTorch's runtime, and start its threads, which the whole process shares.

    Raises:
        InputError: it is not installed, or was built for another PyTorch.
    """
    runtime = _imported("executorch.runtime")
    with contextlib.suppress(ImportError, AttributeError):  # of releases that do not have it
        library = _imported("executorch.extension.pybindings.portable_lib")
        library._unsafe_reset_threadpool(threads)
    return runtime


def check_installed() -> None:
    """Raise InputError, with the remedy, if files cannot be written and run here."""
    _imported("executorch.runtime")


@torch.no_grad()
def convert(
    model: nn.Module, example: tuple[Tensor, ...], path: str | Path, batch: Batches
) -> dict[str, Any]:
    """Write a model, on the CPU and in fp32, as a program for XNNPACK.

    Args:
        model: ordinary operators only; maps inputs like ``example`` to one tensor or several.
        example: inputs with any batch.
        path: ends in ``.pte``.
        batch: the batch sizes that the file takes.

    Returns:
        The manifest's details of the file.

    Raises:
        InputError: ExecuTorch is not installed, or does not take the model; with its reason.
    """
    exir = _imported("executorch.exir")
    xnnpack = _imported("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    fixed = batch.min == batch.max
    rows = batch.min if fixed else max(2, batch.opt)  # of 1 the exporter makes a constant
    example = tuple(x[:1].expand(rows, *x.shape[1:]).contiguous() for x in example)
    sizes = {0: torch.export.Dim(BATCH, min=batch.min, max=max(batch.max, 3))}

    def exported(module: nn.Module) -> Any:
        shapes = None if fixed else dynamic_shapes(module, sizes, len(example))
        return torch.export.export(module, example, dynamic_shapes=shapes)

    with quiet("executorch", "root"), plain_attention(model), _one_convolution():
        try:
            program = exported(plainer(exported(model.eval())))
            lowered = exir.to_edge_transform_and_lower(
                program, partitioner=[xnnpack.XnnpackPartitioner()]
            ).to_executorch()
            content = lowered.buffer
        except Exception as error:  # its passes' exceptions have no common base
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"ExecuTorch cannot convert the model: {reason}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return {
        "library": "ExecuTorch",
        "version": importlib.metadata.version("executorch"),
        "batch": batch.to_dict(),
        "targets": ["cpu"],
    }


@contextlib.contextmanager
def _one_convolution() -> Iterator[None]:
    """Leave PyTorch one kernel of convolutions to choose, whatever the batch.

    From 16 images on it would take others than for the example, and memory is planned for those
    sizes alone at which the choice is the same.
    """
    flags = {"enabled": False}
    with torch.backends.mkldnn.flags(**flags), torch.backends.nnpack.flags(**flags):
        yield


def _imported(module: str) -> Any:
    """Import a module of ExecuTorch's; the packages that it imports log a warning."""
    with quiet():
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("executorch", ""):
                raise
            raise InputError(
                "executorch is not installed: pip install 'fastadapt[executorch]'"
            ) from error
        except (ImportError, OSError) as error:  # its libraries are built for one PyTorch
            raise InputError(f"executorch cannot be loaded: {first_line(error)}") from error
