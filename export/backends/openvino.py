"""OpenVINO: the bundle's ONNX file as OpenVINO's own format (.xml and .bin), for Intel's CPUs.

The graph is the ONNX file's; OpenVINO's compiler fuses and lays it out for the CPU at hand when it
is loaded. INT8 is made by NNCF's static quantisation from the same images as ONNX Runtime's.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastadapt.errors import InputError, first_line

from ..settings import Batches

# Tokens beside convolutions: NNCF then keeps in fp32 what transformers need.
TRANSFORMER_OPERATORS = ("MVN", "ScaledDotProductAttention")
WITHOUT_BIAS = "/WithoutBiases"  # ends the name of such an operator's product
SUFFIX = "xml"


def load_openvino() -> Any:
    """Import OpenVINO; its telemetry, which would send statistics at every import, stays out.

    Raises:
        InputError: it is not installed.
    """
    return _without_telemetry("openvino")


def check_installed(int8: bool) -> None:
    """Raise InputError, with the remedy, if a file that is asked for cannot be made here."""
    load_openvino()
    if int8:
        _without_telemetry("nncf")


def convert(onnx: str | Path, path: str | Path, batch: Batches) -> dict[str, Any]:
    """Write ``path`` (.xml) and the weights beside it (.bin) from an fp32 ONNX file.

    Args:
        onnx: the file.
        path: of the result.
        batch: sizes that it will be compared at; it takes others, too.

    Returns:
        The manifest's details of the file.

    Raises:
        InputError: OpenVINO is not installed, or does not take the graph; with its reason.
    """
    openvino = load_openvino()
    try:
        model = openvino.Core().read_model(str(onnx))
        _write(openvino, model, Path(path))
    except OSError:
        raise
    except Exception as error:  # OpenVINO's own exceptions are RuntimeErrors
        name, reason = Path(onnx).name, first_line(error)
        raise InputError(f"OpenVINO cannot convert {name}: {reason}") from error
    return _details(openvino, Path(onnx), batch)


def quantize(
    onnx: str | Path,
    path: str | Path,
    images: Iterable[np.ndarray],
    batch: Batches,
    *,
    fp32_nodes: list[str],
) -> dict[str, Any]:
    """Write an INT8 version of an fp32 ONNX file, with NNCF's static quantisation.

    Args:
        onnx, path, batch: as for :func:`convert`.
        images: batches that give the ranges of the activations, as the file takes them.
        fp32_nodes: names of nodes of the ONNX file that are not quantised.

    Raises:
        InputError: OpenVINO or NNCF is not installed, or fails; with the reason.
    """
    openvino, nncf = load_openvino(), _without_telemetry("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    try:
        model = openvino.Core().read_model(str(onnx))
        kinds = {node.get_type_name() for node in model.get_ops()}
        transformer = bool(kinds & set(TRANSFORMER_OPERATORS))
        # Products with a bias (Gemm) are two operators here.
        kept = [name for node in fp32_nodes for name in (node, f"{node}{WITHOUT_BIAS}")]
        batches = list(images)
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            quantized = nncf.quantize(
                model,
                nncf.Dataset(batches),
                subset_size=len(batches),
                model_type=nncf.ModelType.TRANSFORMER if transformer else None,
                ignored_scope=nncf.IgnoredScope(names=kept, validate=False),
            )
        _write(openvino, quantized, Path(path))
    except OSError:
        raise
    except Exception as error:
        name, reason = Path(onnx).name, first_line(error)
        raise InputError(f"NNCF cannot quantise {name}: {reason}") from error
    return _details(openvino, Path(onnx), batch)


def _details(openvino: Any, onnx: Path, batch: Batches) -> dict[str, Any]:
    return {
        "library": "OpenVINO",
        "version": openvino.__version__,
        "onnx": onnx.name,
        "batch": batch.to_dict(),
        "targets": ["cpu"],
    }


def _write(openvino: Any, model: Any, path: Path) -> None:
    """Write both files under temporary names, then rename them, the weights first."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        file = Path(temporary) / path.name
        openvino.save_model(model, str(file), compress_to_fp16=False)
        for part in (file.with_suffix(".bin"), file):
            part.replace(path.with_name(part.name))


def _without_telemetry(name: str) -> Any:
    """Import a package of OpenVINO's as if its telemetry were not installed."""
    with _hidden("openvino_telemetry"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise InputError(
                f"the package {name} is not installed: pip install 'fastadapt[openvino]'"
            ) from error


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Make imports of a module fail, as they do where it is not installed."""
    kept = sys.modules.get(module)
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if kept is None:
            del sys.modules[module]
        else:
            sys.modules[module] = kept
