"""What an export works with once its model is folded: the gate, the golden samples, the engines."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadapt import __version__
from fastadapt.errors import InputError
from fastadapt.files import write_tensors

from ..backends.onnx import export_onnx
from ..fold import FoldReport
from ..precision.int8 import Images
from .artefact import FAILED, Artefact
from .build import Source as EngineSource
from .graph_input import NAME, Deployed, GraphInput
from .manifest import MODEL
from .onnx_check import BATCHES, Inputs, compare_onnx, onnx_session
from .parity import Parity, Thresholds, compare
from .samples import Pixels, Sample, Samples
from .sources import Trained

# The graph's filter rounds some pixels to the next level: a change of the input, not of the model.
RESIZED = Thresholds(error=0.05, cosine=0.999)
END_TO_END = "end to end"


@dataclass(frozen=True)
class Material:
    """What an export works with.

    Attributes:
        trained: the model before folding, and what is known of it.
        samples, chosen: all images that may be used, and those of the gate.
        graph_input: what the files take.
        pixels: of the chosen images.
        others: further inputs of the model, by name.
        example: all its inputs, the normalised images first.
        expected: its outputs for them [samples, outputs].
        folded, fold_report: what folding made.
    """

    trained: Trained
    samples: Samples
    chosen: list[Sample]
    graph_input: GraphInput
    pixels: Pixels
    others: dict[str, Tensor]
    example: tuple[Tensor, ...]
    expected: np.ndarray
    folded: nn.Module
    fold_report: FoldReport

    @property
    def classes(self) -> bool:
        return bool(self.trained.labels)

    @property
    def inputs(self) -> Inputs:
        """What the files take, for the chosen images."""
        others = {name: x.numpy() for name, x in self.others.items()}
        return {NAME: self.graph_input.array(self.pixels.given.numpy()), **others}

    def write_onnx(self, module: nn.Module, path: Path, **options: Any) -> dict[str, Any]:
        """:func:`export_onnx` of a module that takes and gives what ``folded`` does."""
        return export_onnx(
            module,
            path,
            input_size=self.trained.preprocess.input_size,
            other_inputs={name: tuple(x.shape[1:]) for name, x in self.others.items()},
            graph_input=self.graph_input,
            labels=self.trained.labels,
            metadata=_metadata(self.trained, self.graph_input),
            **options,
        )


def gate(file: Path, material: Material) -> list[Parity]:
    """Unfolded against folded, folded against ONNX Runtime, and the first against the last."""
    expected, classes, example = material.expected, material.classes, material.example
    parities = [_resizing(material)] if material.graph_input.resize else []
    for batch in BATCHES:
        folded = outputs(material.folded, example, batch)
        parities.append(compare(expected, folded, stage="folding", batch=batch, classes=classes))
    references = {"ONNX Runtime": folded, END_TO_END: expected}
    try:
        session = onnx_session(file)
    except InputError as error:
        return [*parities, Parity("ONNX Runtime", 0, len(expected), problems=(str(error),))]
    return parities + compare_onnx(session, material.inputs, references, classes)


def _resizing(material: Material) -> Parity:
    """What the graph's way of resizing changes, beside the training's."""
    trained, expected = material.trained, material.expected
    normalized = trained.preprocess.normalize(material.pixels.training)
    training = outputs(trained.model, (normalized, *material.example[1:]), batch=8)
    return compare(
        training,
        expected,
        stage="resizing",
        batch=len(expected),
        classes=material.classes,
        thresholds=RESIZED,
    )


def failed_onnx(folder: Path, problems: list[str]) -> Artefact:
    """The fp32 file of a bundle that the gate rejected."""
    files = tuple(sorted(file.name for file in folder.glob(f"{MODEL}*")))
    return Artefact("onnx", MODEL, "fp32", FAILED, reason=problems[0], files=files)


def engine_source(
    folder: Path, material: Material, parities: list[Parity], speed: bool
) -> EngineSource:
    """What engines are made from."""
    return EngineSource(
        folder=folder,
        onnx=folder / MODEL,
        onnx_parity=[parity for parity in parities if parity.stage == END_TO_END],
        folded=material.folded,
        example=tuple(x[:1] for x in material.example),
        inputs=material.inputs,
        expected=material.expected,
        exact=lambda: _outputs_fp64(material.trained.model, material.example),
        classes=material.classes,
        write_onnx=material.write_onnx,
        deployed=lambda module: Deployed(module, material.graph_input),
        images=lambda: _quantization_images(material),
        speed=speed,
    )


def check_quantization(flag: str, trained: Trained, samples: Samples) -> None:
    """Raises InputError if there is nothing to calibrate INT8 or FP8 with, or to judge it by."""
    if not samples.calibration or not samples.validation:
        raise InputError(
            f"{flag} is calibrated and judged on image files: give a folder of them with --images"
        )
    if not trained.labels:
        raise InputError(f"{flag} is judged by its accuracy, and this model has no classes")
    if trained.domain_features is not None:
        raise InputError(f"{flag} is for graphs that take images alone: leave out --domain-input")


def _quantization_images(material: Material) -> Images:
    """What INT8 and FP8 are calibrated with, and judged by."""
    labels, validation = material.trained.labels, material.samples.validation
    known = all(sample.label in labels for sample in validation)
    preprocess = material.trained.preprocess

    def read(paths: Sequence[Path]) -> np.ndarray:
        pixels = torch.stack([preprocess.read(path) for path in paths])
        return material.graph_input.array(pixels.numpy())

    return Images(
        [sample.path for sample in material.samples.calibration],
        [sample.path for sample in validation],
        np.array([labels.index(sample.label) for sample in validation]) if known else None,
        read,
    )


def _metadata(trained: Trained, graph_input: GraphInput) -> dict[str, Any]:
    hashes = {"run_sha256": "config_sha256", "adapter_sha256": "adapter_sha256"}
    return {
        "preprocessing": graph_input.to_dict(),
        "fastadapt": __version__,
        "backbone": trained.backbone,
        **{key: trained.source[name] for key, name in hashes.items() if name in trained.source},
    }


def write_golden(path: Path, material: Material) -> None:
    """What the model gets (images in uint8), and what the trained model says to it."""
    names = [sample.path.name for sample in material.chosen]
    labels = [sample.label for sample in material.chosen]
    expected = torch.from_numpy(material.expected)
    tensors = {NAME: material.pixels.given, **material.others, "expected": expected}
    metadata = {"files": names, "labels": labels}
    write_tensors(
        path, tensors, {k: json.dumps(v, ensure_ascii=False) for k, v in metadata.items()}
    )


@torch.no_grad()
def outputs(
    model: nn.Module, inputs: tuple[Tensor, ...], batch: int, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    batches = zip(*(x.split(batch) for x in inputs), strict=True)
    parts = [model(*part).flatten(1) for part in batches]
    return torch.cat(parts).to(dtype).numpy()


def _outputs_fp64(model: nn.Module, inputs: tuple[Tensor, ...]) -> np.ndarray:
    """What the model would say without its own rounding."""
    exact = copy.deepcopy(model).double()
    return outputs(exact, tuple(x.double() for x in inputs), batch=8, dtype=torch.float64)
