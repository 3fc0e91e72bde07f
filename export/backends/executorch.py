"""ExecuTorch: a folded model as a .pte program, for phones, boards and CPUs.

PyTorch exports the model, and ExecuTorch's partitioner gives XNNPACK all that it can compute; what
it cannot (LayerNorm, for one) ExecuTorch's portable operators do. The batch is dynamic between the
smallest and the largest size; memory is planned for the largest when the file is written.

INT8 is made by torchao's quantisation of exported programs with ExecuTorch's quantiser for XNNPACK,
with a scale for each output channel of weights and one for each activation.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt.errors import InputError, first_line
from fastadapt.files import atomic_path

from ..graph_input import BATCH
from ..precision.bias_correction import same_weight
from ..settings import Batches
from .tracing import dynamic_shapes, plain_attention, plainer, quiet

SUFFIX = "pte"
METHOD = "forward"
LIBRARIES = ("executorch", "torchao")  # the second is the first's quantiser
QUANTIZER = "executorch.backends.xnnpack.quantizer.xnnpack_quantizer"


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


def check_installed(int8: bool) -> None:
    """Raise InputError, with the remedy, if files cannot be written and run here."""
    _imported("executorch.runtime")
    if int8:
        _imported("torchao.quantization.pt2e.quantize_pt2e")


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
    return _write(model, example, path, batch, change=None)


def quantize(
    model: nn.Module,
    example: tuple[Tensor, ...],
    path: str | Path,
    images: Iterable[np.ndarray],
    batch: Batches,
    fp32_weights: Sequence[np.ndarray] = (),
) -> dict[str, Any]:
    """Write a model as a program in INT8; what few numbers decide stays in fp32.

    Args:
        model, example, path, batch: as for :func:`convert`; images are the only input.
        images: batches that give the ranges of the activations, as the file takes them.
        fp32_weights: of layers that stay in fp32, too.

    Returns:
        The manifest's details of the file.

    Raises:
        InputError: ExecuTorch or torchao is not installed, or fails; with the reason.
    """
    rows = batch.min if batch.min == batch.max else None  # a fixed batch takes no other

    def to_int8(module: nn.Module) -> nn.Module:
        recipes = _imported(QUANTIZER)
        pt2e = _imported("torchao.quantization.pt2e.quantize_pt2e")
        quantizer = recipes.XNNPACKQuantizer()
        quantizer.set_global(recipes.get_symmetric_quantization_config(is_per_channel=True))
        kept = {
            name
            for name, weight in module.named_parameters()
            if any(same_weight(weight.detach().numpy(), other) for other in fp32_weights)
        }
        quantizer.set_filter_function(lambda node: _is_quantized(node, kept))
        prepared = pt2e.prepare_pt2e(module, quantizer)
        for given in images:
            for part in np.array_split(given, -(-len(given) // rows)) if rows else [given]:
                full = np.resize(part, (rows or len(part), *part.shape[1:]))
                prepared(torch.from_numpy(full))
        return pt2e.convert_pt2e(prepared)

    return _write(model, example, path, batch, change=to_int8)


def _is_quantized(node: Any, kept: set[str]) -> bool:
    """Tell whether the quantiser may take a node, so that it takes what ONNX Runtime's does.

    Those are products of tokens with weights, convolutions, and sums between convolutions; not
    those with one of the weights ``kept``. It asks of their weights and activations, too.
    """
    aten = torch.ops.aten
    if kept & {getattr(given, "target", None) for given in node.all_input_nodes}:
        return False
    if node.target in (aten.mul.Tensor, aten.cat.default, aten.adaptive_avg_pool2d.default):
        return False
    least = {aten.linear.default: 3, aten.add.Tensor: 4}.get(node.target, 0)
    return not least or all(x.meta["val"].dim() >= least for x in node.all_input_nodes[:1])


@torch.no_grad()
def _write(
    model: nn.Module,
    example: tuple[Tensor, ...],
    path: str | Path,
    batch: Batches,
    change: Callable[[nn.Module], nn.Module] | None,
) -> dict[str, Any]:
    exir = _imported("executorch.exir")
    xnnpack = _imported("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    fixed = batch.min == batch.max
    rows = batch.min if fixed else max(2, batch.opt)  # of 1 the exporter makes a constant
    example = tuple(x[:1].expand(rows, *x.shape[1:]).contiguous() for x in example)

    def exported(module: nn.Module) -> Any:
        shapes = None
        if not fixed:
            size = torch.export.Dim(BATCH, min=batch.min, max=max(batch.max, 3))
            shapes = dynamic_shapes(module, {0: size}, len(example))
        return torch.export.export(module, example, dynamic_shapes=shapes)

    with quiet("executorch", "root"), plain_attention(model), _one_convolution():
        try:
            program = exported(plainer(exported(model.eval())))
            if change is not None:
                program = exported(change(program.module(check_guards=False)))
            lowered = exir.to_edge_transform_and_lower(
                program, partitioner=[xnnpack.XnnpackPartitioner()]
            ).to_executorch()
            content = lowered.buffer
        except OSError:
            raise
        except Exception as error:  # its passes' exceptions have no common base
            what = "convert" if change is None else "quantise"
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"ExecuTorch cannot {what} the model: {reason}") from error
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
            library = (error.name or "executorch").partition(".")[0]
            if library not in LIBRARIES:
                raise
            raise InputError(
                f"the package {library} is not installed: pip install 'fastadapt[executorch]'"
            ) from error
        except (ImportError, OSError) as error:  # its libraries are built for one PyTorch
            raise InputError(
                f"the package executorch cannot be loaded: {first_line(error)}"
            ) from error
