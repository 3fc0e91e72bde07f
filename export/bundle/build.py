"""The files that run: what was asked for is built, run where it can run, and compared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from fastadapt.errors import InputError

from ..artefact import FAILED, REFUSED, UNVERIFIED, VERIFIED, Artefact
from ..backends import aotinductor, coreml, fastadapt, openvino, tensorrt
from ..backends.fused_attention import fuse_attention
from ..backends.onnx import read_interface
from ..features import WithFeatures
from ..graph_input import Deployed
from ..precision import fp8, half
from ..precision.fallback import RANKING_IMAGES, Int8Layers, keep_layers
from ..precision.int8 import CALIBRATION_IMAGES, Judgement, judge, judge_accuracy
from ..precision.qdq import write_qdq
from ..runtimes import load_runtime
from ..settings import Batches
from ..speed import LEAST_SPEEDUP, format_rate, speeds_in_turns
from ..tasks import side_by_side
from .engine_options import EngineOptions
from .folded_model import FoldedModel, Variant, describe_artefact
from .int8_files import (
    EDGE,
    accept,
    build_edge_int8,
    build_int8,
    build_openvino_int8,
    check_images_alone,
    describe_onnx,
    device,
    refuse,
)
from .verify_artefact import Reference, measure, verify_artefact

# The first opset whose convolutions take bf16; from 23 on, attention becomes one operator.
BF16_OPSET = 22
EightBit = Literal["int8", "fp8"]
EIGHT_BIT: tuple[EightBit, ...] = ("int8", "fp8")


def build_artefacts(
    options: EngineOptions, folded: FoldedModel, console: Console | None = None
) -> list[Artefact]:
    """Build and check everything that was asked for; the fp32 ONNX file comes first.

    Raises:
        InputError: something cannot be built.
    """
    console = console or Console(quiet=True)
    found = [_check_fp32_onnx(options, folded)]
    layers = Int8Layers(folded.onnx, folded.images, device(), options.calibration)
    variant = Variant(folded.module, "fp32", folded.onnx, {})
    if options.precision != "fp32":
        reduced = _reduce(options, folded, console)
        graph = folded.path(reduced.precision, "onnx")
        variant = Variant(reduced.module, reduced.precision, graph, reduced.to_dict())
        least = BF16_OPSET if variant.precision == "bf16" else folded.opset
        folded.write_onnx(variant.module, graph, opset=max(least, folded.opset))
        found.append(_half_onnx(options, folded, reduced))
        _tell(console, found[-1])
    if options.fused_attention:
        with console.status("fuse the attention …"):
            found.append(_build_fused(options, folded, variant))
        _tell(console, found[-1])
    if options.trt:
        found.append(_build_engine(options, folded, variant, console))
        _tell(console, found[-1])
        for precision in [name for name in EIGHT_BIT if getattr(options, name)]:
            for artefact in _build_eight_bit_engine(options, folded, precision, console):
                found.append(artefact)
                _tell(console, artefact)
    if options.openvino:
        path = folded.path("fp32", openvino.SUFFIX)
        details = openvino.convert(folded.onnx, path, options.batch)
        found.append(_checked(describe_artefact("openvino", path, "fp32", details), folded))
        _tell(console, found[-1])
        if options.int8 and found[-1].status == VERIFIED:  # else the bundle is rejected
            with console.status("quantise to INT8 for OpenVINO …"):
                found.append(build_openvino_int8(options, folded, layers))
            _tell(console, found[-1])
    for kind in [name for name in EDGE if getattr(options, name)]:
        with console.status(f"convert for {kind} …"):
            found.append(_checked(_convert_for_edge(kind, options, folded), folded))
        _tell(console, found[-1])
        if options.int8 and found[-1].status == VERIFIED:  # else the bundle is rejected
            with console.status(f"quantise to INT8 for {kind} …"):
                found.append(build_edge_int8(kind, options, folded, layers))
            _tell(console, found[-1])
    if options.coreml:
        with console.status("convert for Core ML …"):
            converted = _convert_for_core_ml(options, folded, variant)
        found.append(_checked(converted, folded))
        _tell(console, found[-1])
    if options.aoti:
        with console.status("compile with AOTInductor …"):
            own = replace(variant, module=copy.deepcopy(variant.module))  # goes to the GPU
            compiled = _compile(options, folded, own)
        found.append(_checked(compiled, folded))
        _tell(console, found[-1])
        if options.fp8_pt2 and found[-1].status == VERIFIED:  # else the bundle is rejected
            with console.status("compile in FP8 …"):
                found.append(_build_fp8(options, folded, variant))
            _tell(console, found[-1])
    if options.fused:
        with console.status("fuse …"):
            found.append(_build_own(options, folded))
        _tell(console, found[-1])
        if options.fp8:
            with console.status("fuse in FP8 …"):
                found.append(_build_own_fp8(options, folded))
            _tell(console, found[-1])
    if options.int8 and not options.trt:
        with console.status("quantise to INT8 …"):
            found.append(build_int8(options, folded, layers))
        _tell(console, found[-1])
    return found


def rebuild_artefact(
    folder: str | Path, artefact: Artefact, reference: Reference, console: Console | None = None
) -> Artefact:
    """Build a TensorRT engine anew, for the GPU and library at hand, from its ONNX file.

    Args:
        folder: of the bundle; holds the ONNX file. The engine's files in it are replaced.
        artefact: whose file does not run here.
        reference: as for :func:`verify_artefact`, which is called at the end.
        console: where progress is shown.

    Raises:
        InputError: the artefact is no TensorRT engine, its ONNX file is missing, or no library
            here serves this GPU.
    """
    if artefact.kind not in ("tensorrt", "tensorrt_rtx") or artefact.path is None:
        raise InputError(
            f"{artefact.path or artefact.kind} cannot be rebuilt here: only TensorRT engines are "
            "made from the bundle's ONNX file; export again for another"
        )
    folder, details = Path(folder), artefact.details
    if not {"batch", "onnx"} <= details.keys() or not (folder / details["onnx"]).is_file():
        raise InputError(f"{artefact.path} cannot be rebuilt: its ONNX file is not in the bundle")
    config = tensorrt.EngineConfig(
        Batches(**details["batch"]),
        workspace=details.get("workspace"),
        hardware_compatible=details.get("hardware_compatible", False),
        version_compatible=details.get("version_compatible", False),
    )
    flavour = tensorrt.choose_flavour(config)
    path, graph = folder / artefact.path, folder / details["onnx"]
    built = tensorrt.build_engine(
        graph, path, config, flavour=flavour, precision=artefact.precision, console=console
    )
    kept = {key: value for key, value in built.items() if key != "layers"}
    fresh = describe_artefact(built["kind"], path, artefact.precision, {**details, **kept})
    return verify_artefact(folder, fresh, reference)


def _checked(artefact: Artefact, folded: FoldedModel) -> Artefact:
    return verify_artefact(folded.folder, artefact, folded.reference, speed=folded.speed)


def _check_fp32_onnx(options: EngineOptions, folded: FoldedModel) -> Artefact:
    """Check the file that the gate ran on the CPU on a GPU, and at the batch sizes asked for."""
    found = describe_artefact("onnx", folded.onnx, "fp32", {"batch": options.batch.to_dict()})
    if options == EngineOptions() and not torch.cuda.is_available():
        speed = {}
        if folded.speed:
            runtime = load_runtime(folded.onnx)
            speed[runtime.name] = measure(runtime, folded.reference.inputs, options.batch)
        return replace(found, status=VERIFIED, parity=tuple(folded.onnx_parity), speed=speed)
    found = _checked(found, folded)
    return replace(found, parity=(*folded.onnx_parity, *found.parity))


def _half_onnx(options: EngineOptions, folded: FoldedModel, reduced: half.Reduced) -> Artefact:
    details = {"batch": options.batch.to_dict(), **reduced.to_dict()}
    path = folded.path(reduced.precision, "onnx")
    found = _checked(describe_onnx(path, reduced.precision, details), folded)
    return replace(found, parity=(reduced.parity, *found.parity))


def _build_fused(options: EngineOptions, folded: FoldedModel, variant: Variant) -> Artefact:
    """Fuse the attention of a variant's graph; keep it if it is accurate, and faster where it runs.

    A file that does not load is refused as well: which precisions ONNX Runtime's operator computes
    depends on its release and the machine.
    """
    precision = variant.precision
    path = folded.path(precision, "fused.onnx")
    count = fuse_attention(variant.onnx, path, gpu=precision == "fp16")
    details = {"batch": options.batch.to_dict(), **variant.notes, "fused_attention": count}
    if not count:
        artefact = describe_artefact("onnx", path, precision, details)
        return refuse(artefact, folded, ["there is no attention that ONNX Runtime fuses"])
    found = _checked(describe_onnx(path, precision, details), folded)
    problems = [found.reason] if found.status == FAILED else []
    if found.status == VERIFIED:
        batch = options.batch.opt
        example = [np.resize(x, (batch, *x.shape[1:])) for x in folded.reference.inputs.values()]
        runtimes = [load_runtime(file) for file in (variant.onnx, path)]
        rival, speed = speeds_in_turns(runtimes, *example)
        if speed < LEAST_SPEEDUP * rival:
            problems = [
                f"{format_rate(speed)} images/s at batch {batch} where {variant.onnx.name} has "
                f"{format_rate(rival)} ({runtimes[0].name}): not faster"
            ]
    return refuse(found, folded, problems) if problems else found


def _reduce(options: EngineOptions, folded: FoldedModel, console: Console) -> half.Reduced:
    reference = folded.reference
    batches = [torch.from_numpy(x).split(8) for x in reference.inputs.values()]

    @torch.no_grad()
    def outputs(module: nn.Module):
        model = folded.deployed(module).to(device())
        parts = [model(*(x.to(device()) for x in part)) for part in zip(*batches, strict=True)]
        return torch.cat([side_by_side(part).float().cpu() for part in parts]).numpy()

    reduced = half.reduce_precision(
        folded.module,
        options.precision,
        half.Trial(outputs, reference.expected, folded.example, reference.classes, reference.tasks),
        tell=lambda line: console.print(f"  {line}", markup=False),
    )
    reduced.module.cpu()  # it was judged on the GPU, if there is one; what follows begins here
    return reduced


def _compile(options: EngineOptions, folded: FoldedModel, variant: Variant) -> Artefact:
    """Compile a variant with AOTInductor; its module is moved to the GPU if there is one."""
    path = folded.path(variant.precision, "pt2")
    module = variant.module if folded.reference.features is None else WithFeatures(variant.module)
    model = folded.deployed(module).to(device())
    inputs = folded.reference.inputs
    example = tuple(torch.from_numpy(x[:1]).to(device()) for x in inputs.values())
    details = aotinductor.build_aoti(
        model, example, path, options.batch, precision=variant.precision
    )
    return describe_artefact("aotinductor", path, variant.precision, {**details, **variant.notes})


def _convert_for_edge(kind: str, options: EngineOptions, folded: FoldedModel) -> Artefact:
    """Convert the fp32 model, with what stands before it, for phones and boards."""
    path = folded.path("fp32", EDGE[kind].SUFFIX)
    module = folded.module if folded.reference.features is None else WithFeatures(folded.module)
    example = tuple(torch.from_numpy(x[:1]) for x in folded.reference.inputs.values())
    details = EDGE[kind].convert(folded.deployed(module), example, path, options.batch)
    return describe_artefact(kind, path, "fp32", details)


def _convert_for_core_ml(options: EngineOptions, folded: FoldedModel, variant: Variant) -> Artefact:
    """Convert the fp32 model, with what stands before it, for Apple's devices.

    It becomes fp16 where that was asked for and no layer needs fp32: Core ML has no bf16, and
    coremltools casts by operators, not by layers.
    """
    half_fits = variant.precision == "fp16" and not variant.notes.get("fp32_layers")
    precision: Literal["fp32", "fp16"] = "fp16" if half_fits else "fp32"
    path = folded.path(precision, coreml.SUFFIX)
    module = folded.module if folded.reference.features is None else WithFeatures(folded.module)
    example = tuple(torch.from_numpy(x[:1]) for x in folded.reference.inputs.values())
    graph = read_interface(folded.onnx)
    details = coreml.convert(
        folded.deployed(module),
        example,
        path,
        options.batch,
        inputs=graph.inputs,
        outputs=graph.outputs,
        metadata=graph.metadata,
        precision=precision,
    )
    return describe_artefact("coreml", path, precision, details)


def _build_engine(
    options: EngineOptions, folded: FoldedModel, variant: Variant, console: Console
) -> Artefact:
    """Build and check the TensorRT engine of a variant's graph."""
    path = folded.path(variant.precision, "engine")
    details = tensorrt.build_engine(
        variant.onnx, path, options.tensorrt, precision=variant.precision, console=console
    )
    kept = {key: value for key, value in details.items() if key != "layers"}
    built = describe_artefact(details["kind"], path, variant.precision, {**kept, **variant.notes})
    return _checked(built, folded)


def _build_eight_bit_engine(
    options: EngineOptions, folded: FoldedModel, precision: EightBit, console: Console
) -> list[Artefact]:
    """Write a Q/DQ graph and its engine, if the graph is accurate; speed decides where it runs."""
    check_images_alone(f"`{precision}`", folded)
    path, images, batch = folded.path(precision, "onnx"), folded.images(), options.batch
    calibration = images.batches(images.calibration[:CALIBRATION_IMAGES])
    with console.status(f"quantise to {precision.upper()} for TensorRT …"):
        write_qdq(folded.onnx, path, calibration, precision, options.calibration)
        budget = options.int8_budget if precision == "int8" else options.fp8_budget
        judgement = judge_accuracy(folded.onnx, path, images, budget=budget, batch=batch.opt)
    notes: dict[str, Any] = {"batch": batch.to_dict(), "judgement": judgement.to_dict()}
    if precision == "int8":
        notes["calibration"] = options.calibration
    graph = describe_onnx(path, precision, notes)
    if judgement.problems:
        return [refuse(graph, folded, judgement.problems)]
    graph = replace(graph, reason=f"for TensorRT; in ONNX Runtime {judgement}")
    engine = _build_engine(options, folded, Variant(folded.module, precision, path, notes), console)
    problems: tuple[str, ...] = (engine.reason,) if engine.status == FAILED else ()
    rival = folded.path(options.precision, "engine")
    if engine.status == VERIFIED and engine.path is not None and rival.is_file():
        timed = judge(
            folded.onnx,
            folded.folder / engine.path,
            images,
            budget=budget,
            batch=batch.opt,
            rival=(options.precision, rival),
            cuda_graph=True,
        )
        engine = replace(engine, details={**engine.details, "judgement": timed.to_dict()})
        problems = timed.problems
    if problems:
        refuse(graph, folded, problems)
        return [refuse(engine, folded, problems)]
    return [graph, engine]


def _build_fp8(options: EngineOptions, folded: FoldedModel, bf16: Variant) -> Artefact:
    """Compile in FP8; keep it if it is accurate, and faster than the bundle's .pt2 in bf16."""
    check_images_alone("`fp8`", folded)
    assert isinstance(bf16.module, half.MixedPrecision)
    images = folded.images()
    batches = images.batches(images.calibration[:CALIBRATION_IMAGES])
    given = (torch.from_numpy(batch).to(device()) for batch in batches)
    quantized, ranges = fp8.quantize_fp8(
        bf16.module, given, lambda module: folded.deployed(module).to(device())
    )
    if not ranges:
        reason = "no linear layer of tokens has sizes that are multiples of 16"
        details = {"batch": options.batch.to_dict()}
        return Artefact("aotinductor", None, "fp8", REFUSED, reason, details=details)
    notes = {**bf16.notes, "fp8_layers": ranges}
    artefact = _compile(options, folded, Variant(quantized, "fp8", bf16.onnx, notes))
    judgement = judge(
        folded.onnx,
        folded.path("fp8", "pt2"),
        images,
        budget=options.fp8_budget,
        batch=options.batch.opt,
        rival=("bf16", folded.path(bf16.precision, "pt2")),
        cuda_graph=True,  # whose speed is the GPU's, not the host's
    )
    return accept(artefact, judgement, folded)


def _build_own(options: EngineOptions, folded: FoldedModel) -> Artefact:
    """Write fastadapt's own operations; they are refused, not failed, if too inexact."""
    precision = "fp16" if options.precision == "fp16" else "bf16"
    path = folded.path(precision, fastadapt.SUFFIX)
    model = folded.deployed(folded.module)
    details = fastadapt.build_fused(model, path, options.batch, precision=precision)
    found = _checked(describe_artefact("fastadapt", path, precision, details), folded)
    return refuse(found, folded, [found.reason]) if found.status == FAILED else found


def _build_own_fp8(options: EngineOptions, folded: FoldedModel) -> Artefact:
    """Write them in FP8, with blocks in bf16 where it costs too much accuracy.

    The file is kept if it is accurate, and faster than the same operations in bf16.
    """
    check_images_alone("`fp8`", folded)
    path, images = folded.path("fp8", fastadapt.SUFFIX), folded.images()
    model = folded.deployed(folded.module)
    batches = images.batches(images.calibration[:CALIBRATION_IMAGES])
    assert isinstance(model, Deployed)
    float8 = fastadapt.calibrate_float8(model, map(torch.from_numpy, batches), device())
    if not float8.ranges:
        reason = "no block has sizes that are multiples of 16"
        details = {"batch": options.batch.to_dict()}
        return Artefact("fastadapt", None, "fp8", REFUSED, reason, details=details)
    bf16 = folded.path("bf16", fastadapt.SUFFIX)
    rival = ("bf16", bf16) if bf16.is_file() else None

    def write(keep: Sequence[str]) -> dict[str, Any]:
        kept = replace(float8, keep=[int(step) for step in keep])
        return fastadapt.build_fused(model, path, options.batch, precision="fp8", float8=kept)

    def judged() -> Judgement:
        budget, batch = options.fp8_budget, options.batch.opt
        return judge(folded.onnx, path, images, budget=budget, batch=batch, rival=rival)

    def ranking() -> torch.Tensor:
        return torch.from_numpy(images.read(images.calibration[-RANKING_IMAGES:]))

    steps = fastadapt.Float8Steps(float8, ranking)
    kept = keep_layers(write, judged, steps, "blocks in bf16")
    own = {"bf16_steps": [int(step) for step in kept.fp32_layers], "tried": list(kept.tried)}
    artefact = describe_artefact("fastadapt", path, "fp8", {**kept.written, **own})
    return accept(artefact, kept.judgement, folded)


def _tell(console: Console, artefact: Artefact) -> None:
    mark = {VERIFIED: "[green]✓[/]", UNVERIFIED: "[yellow]?[/]"}.get(artefact.status, "[red]✗[/]")
    name = artefact.path or f"{artefact.kind} in {artefact.precision}"
    reason = f": {artefact.reason}" if artefact.reason else ""
    if artefact.details.get("fp32_layers"):
        reason += f" ({len(artefact.details['fp32_layers'])} layers in fp32)"
    said = escape(f"{name} {artefact.status}{reason}")
    console.print(f"{mark} {said}", highlight=False)
