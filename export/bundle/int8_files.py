"""INT8 for CPUs: files of every runtime, kept if they are accurate and faster than fp32.

What is accepted or refused here is so for the other 8-bit files, too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastadapt.errors import InputError

from ..artefact import REFUSED, VERIFIED, Artefact
from ..backends import executorch, litert, openvino
from ..backends.opsets import older_runtimes_of
from ..precision import half
from ..precision.bias_correction import corrected_module
from ..precision.fallback import Int8Layers, Kept, keep_layers
from ..precision.int8 import CALIBRATION_IMAGES, Judgement, judge
from ..precision.quantizer import delicate_nodes
from .engine_options import EngineOptions
from .folded_model import FoldedModel, describe_artefact
from .verify_artefact import verify_artefact

EDGE = {"executorch": executorch, "litert": litert}


def build_int8(options: EngineOptions, folded: FoldedModel, layers: Int8Layers) -> Artefact:
    """Quantise to INT8; keep it if it is accurate, and faster than fp32."""
    check_images_alone("`int8`", folded)
    path, images = folded.path("int8", "onnx"), folded.images()
    found = keep_layers(
        lambda keep: layers.calibrated.write(path, keep),
        lambda: judge(
            folded.onnx, path, images, budget=options.int8_budget, batch=options.batch.opt
        ),
        layers,
    )
    notes = {"batch": options.batch.to_dict(), "calibration": options.calibration}
    artefact = describe_onnx(path, "int8", {**notes, **found.to_dict()})
    return accept(artefact, found.judgement, folded)


def build_openvino_int8(
    options: EngineOptions, folded: FoldedModel, layers: Int8Layers
) -> Artefact:
    """Quantise with NNCF; keep it if it is accurate, and faster than OpenVINO in fp32."""
    check_images_alone("`int8`", folded)
    path, images = folded.path("int8", openvino.SUFFIX), folded.images()
    delicate = delicate_nodes(folded.onnx)

    def write(keep: Sequence[str]) -> dict[str, Any]:
        return openvino.quantize(
            folded.onnx,
            path,
            images.batches(images.calibration[:CALIBRATION_IMAGES]),
            options.batch,
            fp32_nodes=[*delicate, *(node for name in keep for node in layers.nodes[name])],
        )

    found = keep_layers(write, lambda: _judge_beside_fp32(path, folded, options), layers)
    return _accept_kept("openvino", path, found, folded)


def build_edge_int8(
    kind: str, options: EngineOptions, folded: FoldedModel, layers: Int8Layers
) -> Artefact:
    """Quantise for an edge runtime; keep it if it is accurate, and faster than its fp32."""
    check_images_alone("`int8`", folded)
    suffix, images = EDGE[kind].SUFFIX, folded.images()
    path = folded.path("int8", suffix)
    example = tuple(torch.from_numpy(x[:1]) for x in folded.reference.inputs.values())
    plain = half.without_batch_norms(folded.module, *folded.example)

    def write(keep: Sequence[str]) -> dict[str, Any]:
        module = folded.deployed(corrected_module(plain, layers.shifts(keep)))
        calibration = images.batches(images.calibration[:CALIBRATION_IMAGES])
        weights = [layers.weights[name] for name in keep]
        if kind == "executorch":
            return executorch.quantize(
                module, example, path, calibration, options.batch, fp32_weights=weights
            )
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            corrected = Path(temporary) / path.name
            litert.convert(module, example, corrected, options.batch)
            return litert.quantize(
                corrected, path, calibration, options.batch, fp32_weights=weights
            )

    found = keep_layers(write, lambda: _judge_beside_fp32(path, folded, options), layers)
    return _accept_kept(kind, path, found, folded)


def _judge_beside_fp32(path: Path, folded: FoldedModel, options: EngineOptions) -> Judgement:
    """Judge an INT8 file beside the same runtime's file in fp32."""
    return judge(
        folded.onnx,
        path,
        folded.images(),
        budget=options.int8_budget,
        batch=options.batch.opt,
        rival=("fp32", folded.path("fp32", path.suffix[1:])),
    )


def _accept_kept(kind: str, path: Path, found: Kept, folded: FoldedModel) -> Artefact:
    """Check an INT8 file with the layers that it keeps in fp32, or refuse it."""
    details = {**found.written, **found.to_dict()}
    return accept(describe_artefact(kind, path, "int8", details), found.judgement, folded)


def check_images_alone(flag: str, folded: FoldedModel) -> None:
    """Raise InputError for a model that 8 bits cannot be judged of, or be calibrated for."""
    if not folded.reference.classes:
        raise InputError(f"{flag} is judged by its accuracy, and this model has no classes")
    if len(folded.reference.inputs) > 1:
        raise InputError(f"{flag} takes models whose only input is images")


def describe_onnx(path: Path, precision: str, details: dict[str, Any]) -> Artefact:
    """Describe an ONNX file beside the fp32 one, with the runtimes that take it."""
    details = {**details, "taken_by": older_runtimes_of(path)}
    return describe_artefact("onnx", path, precision, details)


def accept(artefact: Artefact, judgement: Judgement, folded: FoldedModel) -> Artefact:
    """Check an 8-bit file, or refuse it by its judgement; a refused one's files are deleted."""
    details = {**artefact.details, "judgement": judgement.to_dict()}
    artefact = replace(artefact, details=details)
    if not judgement.problems:
        reference = replace(folded.reference, exact=None)
        found = verify_artefact(folded.folder, artefact, reference, speed=folded.speed)
        if found.status == VERIFIED:
            return found
        problems: tuple[str, ...] = (found.reason,)
        artefact = replace(artefact, parity=found.parity)
    else:
        problems = judgement.problems
    return refuse(artefact, folded, problems)


def refuse(artefact: Artefact, folded: FoldedModel, problems: Sequence[str]) -> Artefact:
    """Delete a file that is not good enough, and keep what is known of it."""
    for file in artefact.files:
        (folded.folder / file).unlink()
    reason = "; ".join(problems)
    return replace(artefact, path=None, status=REFUSED, reason=reason, files=())


def device() -> str:
    """Return where files are built and judged: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
