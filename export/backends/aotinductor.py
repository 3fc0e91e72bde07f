"""AOTInductor: a folded model to a .pt2, compiled ahead of time and run without Python.

Inductor writes fused kernels for the folded model's ordinary operators (Triton's on a GPU, stored
as cubins in the file; C++ on a CPU), so that loading needs neither this package nor Triton. On a
GPU fastadapt's own kernels for the mixing of cluster attention's transforms are compiled into the
file as well (:mod:`fastadapt.kernels.cluster_attention.aot`), and in half precision GELU goes into
the product before it and ConvNeXt's norm into the convolution before it
(:mod:`.graph_fusion`). Where that fails, the file holds ordinary operators alone, and its details
say why.
"""

from __future__ import annotations

import contextlib
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt.errors import InputError, first_line
from fastadapt.files import atomic_path, write_json
from fastadapt.kernels.common.dispatch import why_not_device

from ..folded_layers import FoldedClusterAttention
from ..graph_input import BATCH
from ..settings import DEFAULT_BATCHES, Batches
from .graph_fusion import Fusions, fuse, on_gpu_in_half
from .tracing import dynamic_shapes, quiet


def check_compiler() -> None:
    """Raise InputError if there is no C++ compiler, which AOTInductor needs on a GPU, too."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError) as error:
        raise InputError(
            "`aoti` needs a C++ compiler, and none was found: install one (Debian and Ubuntu: "
            "apt install g++), or name yours in the environment variable CXX"
        ) from error


@torch.no_grad()
def build_aoti(
    model: nn.Module,
    example: tuple[Tensor, ...],
    path: str | Path,
    batch: Batches = DEFAULT_BATCHES,
    *,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Compile a model for the device that it is on; write ``path`` and ``path`` + ``.json``.

    ``torch._inductor.aoti_load_package(path)`` loads the file, in C++
    ``torch::inductor::AOTIModelPackageLoader``. Both need libtorch of the version that compiled it
    and, for a GPU, one of the same compute capability; on a CPU, its vector instructions.

    Args:
        model: ordinary operators only; maps inputs like ``example`` to one tensor.
        example: inputs with any batch, on the model's device.
        path: ends in ``.pt2``.
        batch: the batch sizes that the file takes; it is tuned for ``opt``.
        precision: of the model, to be recorded.

    Returns:
        The content of the ``.json``: versions, target, batch, inputs, ``"gelu_in_products"``, how
        many GELUs are, and ``"triton_kernels"``, the names of fastadapt's own kernels in the file,
        or ``"no_triton_kernels"``, why there are none.

    Raises:
        InputError: no compiler; the model cannot be traced or compiled, with the reason.
    """
    path = Path(path)
    check_compiler()
    fixed = batch.min == batch.max
    # The compiler tunes for the batch that it sees; one of 1 it would take for a constant.
    rows = batch.min if fixed else max(2, batch.opt)
    example = tuple(x[:1].expand(rows, *x.shape[1:]).contiguous() for x in example)
    dynamic = None
    if not fixed:
        dynamic = {0: torch.export.Dim(BATCH, min=batch.min, max=max(batch.max, 3))}
    with quiet(), atomic_path(path) as temporary:
        # The compiler insists on the suffix, and a temporary name has another.
        package = temporary.with_name(f"{temporary.name}.pt2")
        try:
            own = _compile_fastest(model, example, dynamic, package)
            _check_linked(package)
            package.replace(temporary)
        finally:
            package.unlink(missing_ok=True)
    details = {
        "library": "AOTInductor",
        "version": torch.__version__,
        "precision": precision,
        "batch": batch.to_dict(),
        "targets": [target(example[0].device)],
        "inputs": [_describe(x, fixed) for x in example],
        "triton_kernels": list(own.kernels),
        "no_triton_kernels": own.why_not,
        "gelu_in_products": own.gelu,
    }
    write_json(path.with_name(f"{path.name}.json"), details)
    return details


@dataclass(frozen=True)
class _Own:
    """What a file has beyond Inductor's code.

    Attributes:
        kernels: names of fastadapt's kernels.
        why_not: the reason where there are none.
        gelu: GELUs that are computed in products.
    """

    kernels: tuple[str, ...] = ()
    why_not: str | None = None
    gelu: int = 0


def _compile(
    model: nn.Module,
    example: tuple[Tensor, ...],
    dynamic: dict[int, Any] | None,
    package: Path,
    *,
    takes: Callable[[Tensor], bool] | None = None,
) -> Fusions:
    """Compile a model; with ``takes``, fused as :func:`~.graph_fusion.fuse` says."""
    gpu, fusions = example[0].is_cuda, Fusions()
    try:
        program = _export(model.eval(), example, dynamic)
        if takes is not None:
            module, fusions = fuse(program, takes)
            if module is not None:
                program = _export(module, example, dynamic)
        with no_probes(vectors=False) if gpu else contextlib.nullcontext():
            torch._inductor.aoti_compile_and_package(program, package_path=str(package))
    except OSError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"AOTInductor cannot compile the model: {reason}") from error
    return fusions


def _export(model: nn.Module, example: tuple[Tensor, ...], dynamic: dict[int, Any] | None) -> Any:
    sizes = None if dynamic is None else dynamic_shapes(model, dynamic, len(example))
    return torch.export.export(model, example, dynamic_shapes=sizes)


def _compile_fastest(
    model: nn.Module, example: tuple[Tensor, ...], dynamic: dict[int, Any] | None, package: Path
) -> _Own:
    """Compile with fastadapt's own kernels and fusions, or, where that fails, without."""
    layers = [m for m in model.modules() if isinstance(m, FoldedClusterAttention)]
    why_not = _why_not_kernels(layers, example[0].device)
    if why_not is not None:
        layers = []
    takes = None if why_not_device(example[0]) is not None else on_gpu_in_half
    if not layers and takes is None:
        _compile(model, example, dynamic, package)
        return _Own(why_not=why_not)
    try:
        from fastadapt.kernels.cluster_attention.aot import KERNELS
        from fastadapt.kernels.depthwise_norm.aot import KERNELS as CONVOLUTION

        for layer in layers:
            layer.kernels = True
        fusions = _compile(model, example, dynamic, package, takes=takes)
    except (InputError, ImportError) as error:  # an ImportError: of another Triton
        why_not = str(error)
    else:
        kernels = (KERNELS if layers else ()) + (CONVOLUTION if fusions.depthwise else ())
        return _Own(kernels, None if kernels else why_not, fusions.gelu)
    finally:
        for layer in layers:
            layer.kernels = False
    _compile(model, example, dynamic, package)
    return _Own(why_not=why_not)


@contextlib.contextmanager
def no_probes(*, vectors: bool) -> Iterator[None]:
    """Keep PyTorch from compiling programs that try out the CPU's vector instructions.

    It names them in every .pt2, for a GPU, too, and compares them whenever it loads one, if only
    for a warning: ten seconds of compiling, and more than a minute on some hosts.

    Args:
        vectors: take the processor at its word, as loading for a CPU needs; else go without.
    """
    from torch._inductor import config, cpu_vec_isa

    try:
        with config.patch({"cpp.vec_isa_ok": vectors}):
            yield
    finally:  # a later compilation for the CPU tries them out
        for function in (cpu_vec_isa.valid_vec_isa_list, cpu_vec_isa.pick_vec_isa):
            getattr(function, "cache_clear", lambda: None)()


def _check_linked(package: Path) -> None:
    """Raise InputError for code that contains a C++ library of its own.

    Two of them in one process have two sets of locales: loading such a file ends the process.
    """
    if sys.platform != "linux":
        return
    with zipfile.ZipFile(package) as archive:
        libraries = [archive.read(n) for n in archive.namelist() if n.endswith(".so")]
    if libraries and not any(b"libstdc++.so" in so or b"libc++.so" in so for so in libraries):
        raise InputError(
            "the C++ compiler linked its own library statically, and such a .pt2 crashes when it "
            "is loaded: libstdc++.so is not where the linker looks; reinstall the compiler's "
            "library (Debian and Ubuntu: apt install --reinstall libstdc++-13-dev, of g++'s "
            "version), or name the folder of libstdc++.so in LIBRARY_PATH"
        )


def _why_not_kernels(layers: list[FoldedClusterAttention], device: torch.device) -> str | None:
    if not layers:
        return "the model has no cluster attention"
    if device.type != "cuda":
        return "they are for GPUs"
    for layer in layers:
        if layer.transforms.dtype == torch.float64:
            return "they are not for fp64"
        if len(layer.transforms) > 128:
            return f"{len(layer.transforms)} centers; they take up to 128"
    return why_not_device(layers[0].centers)


def target(device: torch.device | str) -> str:
    """Name what code is compiled for: ``"sm_90"`` for a GPU, ``"cpu AVX512"`` for a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def _describe(example: Tensor, fixed: bool) -> dict[str, Any]:
    rows = len(example) if fixed else BATCH
    dtype = str(example.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": [rows, *example.shape[1:]]}
