"""What a bundle's files are built of: the folded model, in one precision or another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..artefact import FOLDERS, UNVERIFIED, Artefact
from ..backends.coreml import package_files
from ..parity import Parity
from ..precision.int8 import QuantizationImages
from ..settings import OPSET
from .verify_artefact import Reference


@dataclass(frozen=True)
class FoldedModel:
    """A folded model with all that its files are built from and compared with.

    Attributes:
        folder: where the files are written.
        onnx: the fp32 ONNX file in it, which has passed the gate.
        onnx_parity: what the gate compared.
        module: the fp32 model on the CPU: normalised images to one tensor.
        example: inputs of ``module``, with one sample; images [1, C, H, W] first.
        reference: samples as ``onnx`` takes them, and the trained model's outputs.
        write_onnx: (module, path, opset=...) writes an ONNX file of a module like ``module``.
        deployed: prepends to a module what ``onnx`` has before the model: normalisation.
        images: for INT8 and FP8.
        speed: measure images per second of what passes.
        opset: of the fp32 file.
    """

    folder: Path
    onnx: Path
    onnx_parity: Sequence[Parity]
    module: nn.Module
    example: tuple[Tensor, ...]
    reference: Reference
    write_onnx: Callable[..., Any]
    deployed: Callable[[nn.Module], nn.Module]
    images: Callable[[], QuantizationImages]
    speed: bool = True
    opset: int = OPSET

    def path(self, precision: str, suffix: str) -> Path:
        """Return the name of a file in the folder, ``model.fp16.engine`` for one."""
        return self.folder / f"{self.onnx.stem}.{precision}.{suffix}"


@dataclass(frozen=True)
class Variant:
    """A module in the precision that engine and .pt2 are built in.

    Attributes:
        module: fp32 in, fp32 out.
        precision: of what is between.
        onnx: its graph.
        notes: for the artefacts' details: layers kept in fp32, what was tried.
    """

    module: nn.Module
    precision: str
    onnx: Path
    notes: dict[str, Any]


def describe_artefact(kind: str, path: Path, precision: str, details: dict[str, Any]) -> Artefact:
    """Describe a file that was written, unverified, with the files beside it or in it."""
    if kind in FOLDERS:
        inside = package_files(path)
        return Artefact(kind, path.name, precision, UNVERIFIED, files=inside, details=details)
    beside = path.with_name(f"{path.name}.json")
    data = path.with_name(f"{path.name}.data")
    weights = [path.with_suffix(".bin")] if kind == "openvino" else []
    files = tuple(file.name for file in (path, beside, data, *weights) if file.exists())
    return Artefact(kind, path.name, precision, UNVERIFIED, files=files, details=details)
