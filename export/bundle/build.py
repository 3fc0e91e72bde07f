"""The engines of a bundle: what was asked for is built, run where it can run, and compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from fastadapt.errors import InputError
from fastadapt.kernels.common.arithmetic import ceil_div

from ..backends import aotinductor, tensorrt
from ..backends.onnx import OPSET
from ..precision import fp8
from ..precision import half as precision
from ..precision.int8 import CALIBRATION_IMAGES, Images, Judgement, judge, quantize_int8
from ..runtimes import Runtime, RuntimeUnavailable, load_runtime
from .artefact import (
    DEFAULT_BATCHES,
    FAILED,
    REFUSED,
    THRESHOLDS,
    UNVERIFIED,
    VERIFIED,
    Artefact,
    Batches,
)
from .onnx_check import Inputs, throughput
from .parity import Parity, compare

# The first opset whose convolutions take bf16; from 23 on, attention becomes one operator.
BF16_OPSET = 22


@dataclass(frozen=True)
class EngineOptions:
    """What is to be built beside the fp32 ONNX file.

    Attributes:
        trt: a TensorRT or TensorRT-RTX engine.
        aoti: AOTInductor's .pt2.
        int8: an ONNX file in INT8, if it proves good.
        fp8: a .pt2 in FP8, if it proves good; beside one in bf16.
        precision: of ONNX file, engine and .pt2: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        batch: the batch sizes they are built and checked for.
        targets, workspace, hardware_compatible, version_compatible: as
            :class:`fastadapt.export.backends.tensorrt.EngineConfig`.
        int8_budget, fp8_budget: how much accuracy they may lose, 0.01 for one percentage point.
    """

    trt: bool = False
    aoti: bool = False
    int8: bool = False
    fp8: bool = False
    precision: str = "fp32"
    batch: Batches = DEFAULT_BATCHES
    targets: tuple[str, ...] = ()
    workspace: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    int8_budget: float = 0.01
    fp8_budget: float = 0.01

    @property
    def tensorrt(self) -> tensorrt.EngineConfig:
        return tensorrt.EngineConfig(
            self.batch,
            self.targets,
            self.workspace,
            self.hardware_compatible,
            self.version_compatible,
        )

    def check(self) -> None:
        """Raises InputError for what cannot be done here, before any work; with the remedy."""
        if self.precision not in ("fp32", *precision.DTYPES):
            raise InputError(f"--precision is {self.precision!r}; expected fp32, fp16 or bf16")
        if self.workspace is not None and self.workspace < 1:
            raise InputError(f"--workspace is {self.workspace}; expected MiB, 1 or more")
        for name, budget in (("INT8", self.int8_budget), ("FP8", self.fp8_budget)):
            if not 0 <= budget < 1:
                raise InputError(f"the {name} budget is {budget}; expected 0 to 1, 0.01 say")
        for flag in ("targets", "workspace", "hardware_compatible", "version_compatible"):
            if getattr(self, flag) and not self.trt:
                name = flag.removesuffix("s").replace("_", "-")
                raise InputError(f"--{name} is for TensorRT engines: add --trt")
        if self.trt:
            tensorrt.choose_flavour(self.tensorrt)
        if self.fp8:
            if not self.aoti or self.precision != "bf16":
                raise InputError(
                    "--fp8 is made from the .pt2's model in bf16, and judged beside it: add "
                    "--aoti --precision bf16"
                )
            fp8.check_gpu()
        if self.aoti:
            aotinductor.check_compiler()


@dataclass(frozen=True)
class Source:
    """What the engines are made from.

    Attributes:
        folder: where their files are written.
        onnx: the fp32 ONNX file in it, which has passed the gate.
        onnx_parity: what the gate compared.
        folded: the fp32 model on the CPU: normalised images to one tensor.
        example: inputs of ``folded``: one normalised image, [1, C, H, W], first.
        inputs: what the gate compares on, by name, as ``onnx`` takes it; images first.
        expected: the adapted model's outputs for them, fp32 [samples, outputs].
        exact: the same in fp64 arithmetic; called where fp32's own rounding may matter.
        classes: whether the outputs are classes.
        write_onnx: (module, path, opset=...) writes an ONNX file; module as ``folded``.
        deployed: puts in front of a module what ``onnx`` has in front: normalisation.
        images: for INT8 and FP8.
        speed: measure images per second of what passes.
    """

    folder: Path
    onnx: Path
    onnx_parity: Sequence[Parity]
    folded: nn.Module
    example: tuple[Tensor, ...]
    inputs: Inputs
    expected: np.ndarray
    exact: Callable[[], np.ndarray]
    classes: bool
    write_onnx: Callable[..., Any]
    deployed: Callable[[nn.Module], nn.Module]
    images: Callable[[], Images]
    speed: bool = True


def build_artefacts(
    options: EngineOptions, source: Source, console: Console | None = None
) -> list[Artefact]:
    """Builds and checks everything that was asked for; the fp32 ONNX file comes first.

    Raises:
        InputError: something cannot be built.
    """
    console = console or Console(quiet=True)
    stem = source.onnx.stem
    found = [_check_fp32_onnx(options, source)]
    module, name, graph, notes = source.folded, "fp32", source.onnx, {}
    if options.precision != "fp32":
        reduced = _reduce(options, source, console)
        module, name, notes = reduced.module, reduced.precision, reduced.to_dict()
        graph = source.folder / f"{stem}.{name}.onnx"
        source.write_onnx(module, graph, opset=BF16_OPSET if name == "bf16" else OPSET)
        found.append(_half_onnx(options, source, graph, reduced))
        _tell(console, found[-1])
    if options.trt:
        path = source.folder / f"{stem}.{name}.engine"
        details = tensorrt.build_engine(
            graph, path, options.tensorrt, precision=name, console=console
        )
        kept = {key: value for key, value in details.items() if key != "layers"}
        found.append(_checked(_artefact(details["kind"], path, name, {**kept, **notes}), source))
        _tell(console, found[-1])
    if options.aoti:
        with console.status("compile with AOTInductor …"):
            compiled = _compiled(options, source, copy.deepcopy(module), name, notes)
        found.append(_checked(compiled, source))
        _tell(console, found[-1])
        if options.fp8 and found[-1].status == VERIFIED:  # else the bundle is rejected
            with console.status("compile in FP8 …"):
                found.append(_float8(options, source, module, notes, found[-1].path))
            _tell(console, found[-1])
    if options.int8:
        with console.status("quantise to INT8 …"):
            found.append(_quantized(options, source))
        _tell(console, found[-1])
    return found


def rebuild_artefact(
    folder: str | Path,
    artefact: Artefact,
    inputs: Inputs,
    expected: np.ndarray,
    *,
    classes: bool = True,
    console: Console | None = None,
) -> Artefact:
    """A TensorRT engine anew, for the GPU and library at hand, from the ONNX file it was made of.

    Args:
        folder: of the bundle; holds the ONNX file. The engine's files in it are replaced.
        artefact: whose file does not run here.
        inputs, expected, classes: as for :func:`verify_artefact`, which is called at the end.
        console: where progress is shown.

    Raises:
        InputError: no engine of TensorRT's, no ONNX file, or no library that serves this GPU.
    """
    if artefact.kind not in ("tensorrt", "tensorrt_rtx") or artefact.path is None:
        raise InputError(
            f"{artefact.path or artefact.kind} cannot be rebuilt here: only TensorRT engines are "
            "made from the bundle's ONNX file; export again for another"
        )
    folder, details = Path(folder), artefact.details
    config = tensorrt.EngineConfig(
        Batches(**details["batch"]),
        workspace=details["workspace"],
        hardware_compatible=details["hardware_compatible"],
        version_compatible=details["version_compatible"],
    )
    flavour = tensorrt.choose_flavour(config)
    path, graph = folder / artefact.path, folder / details["onnx"]
    built = tensorrt.build_engine(
        graph, path, config, flavour=flavour, precision=artefact.precision, console=console
    )
    kept = {key: value for key, value in built.items() if key != "layers"}
    fresh = _artefact(built["kind"], path, artefact.precision, {**details, **kept})
    return verify_artefact(folder, fresh, inputs, expected, classes=classes)


def artefact_problems(artefacts: Sequence[Artefact]) -> list[str]:
    """Why the bundle must be rejected: what ran and gave other outputs."""
    return [f"{a.path}: {a.reason}" for a in artefacts if a.status == FAILED]


def verify_artefact(
    folder: str | Path,
    artefact: Artefact,
    inputs: Inputs,
    expected: np.ndarray,
    *,
    classes: bool = True,
    device: str = "auto",
    speed: bool = True,
    exact: Callable[[], np.ndarray] | None = None,
) -> Artefact:
    """Runs a file on this machine and compares, at every batch size that it was built for.

    Args:
        folder: that holds the file.
        artefact: what is known of it; its ``details["batch"]`` says which sizes.
        inputs: by name, as the model takes them, images first.
        expected: outputs of the adapted model.
        classes: whether the outputs are classes.
        device: as for :func:`fastadapt.export.runtimes.load_runtime`.
        speed: measure images per second, too, if it passes.
        exact: ``expected`` in fp64 arithmetic, asked for where fp32's rounding may matter.

    Returns:
        The artefact with the status, parity and speed found here; unverified, with the reason,
        where it cannot run.
    """
    if artefact.path is None:
        return artefact
    try:
        runtime = load_runtime(Path(folder) / artefact.path, artefact.kind, device=device)
    except RuntimeUnavailable as error:
        return replace(artefact, status=UNVERIFIED, reason=str(error))
    except InputError as error:
        return replace(artefact, status=FAILED, reason=str(error))
    sizes = artefact.details.get("batch")
    batch = Batches(**sizes) if sizes else DEFAULT_BATCHES
    parity = compare_runtime(
        runtime, inputs, expected, batch, precision=artefact.precision, classes=classes, exact=exact
    )
    problems = [f"at batch {p.batch}: {problem}" for p in parity for problem in p.problems]
    if problems:
        return replace(artefact, status=FAILED, reason=problems[0], parity=tuple(parity))
    speeds = measure(runtime, inputs, batch) if speed else {}
    result = replace(artefact, parity=tuple(parity), speed={runtime.name: speeds})
    if (
        artefact.precision in precision.DTYPES
        and artefact.kind == "onnx"
        and runtime.device == "cpu"
    ):
        reason = "ONNX Runtime computes it in fp32 on a CPU; that agrees"
        return replace(result, status=UNVERIFIED, reason=reason)
    return replace(result, status=VERIFIED, reason="")


def compare_runtime(
    runtime: Runtime,
    inputs: Inputs,
    expected: np.ndarray,
    batch: Batches,
    *,
    precision: str = "fp32",
    classes: bool = True,
    exact: Callable[[], np.ndarray] | None = None,
) -> list[Parity]:
    """A runtime against the adapted model at MIN, OPT, MAX and an odd batch size.

    Where there are fewer samples than a batch holds, they are repeated. An fp32 result that is off
    by more than a tenth of what is allowed is compared with fp64 as well, if there is ``exact``:
    where the adapted model's own fp32 rounding is the larger error, that decides.
    """
    limits = THRESHOLDS[precision]
    parities = []
    for size in batch.checked:
        count = ceil_div(len(expected), size) * size
        tiled = [_repeat(x, count) for x in inputs.values()]
        try:
            parts = [
                runtime(*(x[start : start + size] for x in tiled))
                for start in range(0, count, size)
            ]
        except InputError as error:
            parities.append(Parity(runtime.name, size, count, problems=(str(error),)))
            continue
        outputs = np.concatenate([part.reshape(len(part), -1) for part in parts])

        def against(reference, stage, size=size, outputs=outputs):
            wanted = _repeat(reference, len(outputs))
            return compare(
                wanted, outputs, stage=stage, batch=size, classes=classes, thresholds=limits
            )

        parity = against(expected, runtime.name)
        close = parity.error is not None and parity.error <= limits.error / 10
        if precision == "fp32" and exact is not None and not close:
            truth = against(exact(), f"{runtime.name}, against fp64")
            parity = truth if truth.passed and not parity.passed else parity
        parities.append(parity)
    return parities


def measure(runtime: Runtime, inputs: Inputs, batch: Batches) -> dict[str, float]:
    """Images per second by batch size, inputs and outputs in the memory of the runtime's device."""
    speeds = {}
    for size in sorted({batch.min, batch.opt, batch.max}):
        given = [torch.from_numpy(_repeat(x, size)).to(runtime.device) for x in inputs.values()]

        def call(given=given):
            runtime(*given)
            if runtime.device == "cuda":
                torch.cuda.synchronize()

        speeds[str(size)] = throughput(call, size, seconds=0.5)
    return speeds


def _repeat(values: np.ndarray, count: int) -> np.ndarray:
    return np.resize(values, (count, *values.shape[1:]))


def _artefact(kind: str, path: Path, name: str, details: dict[str, Any]) -> Artefact:
    beside = path.with_name(f"{path.name}.json")
    data = path.with_name(f"{path.name}.data")
    files = tuple(file.name for file in (path, beside, data) if file.exists())
    return Artefact(kind, path.name, name, UNVERIFIED, files=files, details=details)


def _checked(artefact: Artefact, source: Source, **options: Any) -> Artefact:
    return verify_artefact(
        source.folder,
        artefact,
        source.inputs,
        source.expected,
        classes=source.classes,
        **{"exact": source.exact, "speed": source.speed, **options},
    )


def _check_fp32_onnx(options: EngineOptions, source: Source) -> Artefact:
    """The gate has run it on the CPU; it runs again on a GPU, and at the batch sizes asked for."""
    found = _artefact("onnx", source.onnx, "fp32", {"batch": _sizes(options.batch)})
    if options == EngineOptions() and not torch.cuda.is_available():
        speed = {}
        if source.speed:
            runtime = load_runtime(source.onnx)
            speed[runtime.name] = measure(runtime, source.inputs, options.batch)
        return replace(found, status=VERIFIED, parity=tuple(source.onnx_parity), speed=speed)
    found = _checked(found, source)
    return replace(found, parity=(*source.onnx_parity, *found.parity))


def _half_onnx(
    options: EngineOptions, source: Source, path: Path, reduced: precision.Reduced
) -> Artefact:
    details = {"batch": _sizes(options.batch), **reduced.to_dict()}
    found = _checked(_artefact("onnx", path, reduced.precision, details), source)
    return replace(found, parity=(reduced.parity, *found.parity))


def _reduce(options: EngineOptions, source: Source, console: Console) -> precision.Reduced:
    batches = [torch.from_numpy(x).split(8) for x in source.inputs.values()]

    @torch.no_grad()
    def outputs(module: nn.Module) -> np.ndarray:
        model = source.deployed(module).to(_device())
        parts = [model(*(x.to(_device()) for x in part)) for part in zip(*batches, strict=True)]
        return torch.cat([part.flatten(1).float().cpu() for part in parts]).numpy()

    reduced = precision.reduce_precision(
        source.folded,
        options.precision,
        outputs,
        source.expected,
        source.example,
        classes=source.classes,
        tell=lambda line: console.print(f"  {line}"),
    )
    reduced.module.cpu()  # it was judged on the GPU, if there is one; what follows begins here
    return reduced


def _compiled(
    options: EngineOptions, source: Source, module: nn.Module, name: str, notes: dict[str, Any]
) -> Artefact:
    """AOTInductor's file of a module, which is moved to the GPU if there is one."""
    path = source.folder / f"{source.onnx.stem}.{name}.pt2"
    model = source.deployed(module).to(_device())
    example = tuple(torch.from_numpy(x[:1]).to(_device()) for x in source.inputs.values())
    details = aotinductor.build_aoti(model, example, path, options.batch, precision=name)
    return _artefact("aotinductor", path, name, {**details, **notes})


def _float8(
    options: EngineOptions,
    source: Source,
    module: precision.MixedPrecision,
    notes: dict[str, Any],
    rival: str,
) -> Artefact:
    """In FP8, if that is accurate, and faster than ``rival``, the bundle's .pt2 in bf16."""
    _check_images_alone("--fp8", source)
    images = source.images()
    batches = images.batches(images.calibration[:CALIBRATION_IMAGES])
    given = (torch.from_numpy(batch).to(_device()) for batch in batches)
    quantized, ranges = fp8.quantize_fp8(module, given, lambda m: source.deployed(m).to(_device()))
    if not ranges:
        reason = "no linear layer of tokens has sizes that are multiples of 16"
        details = {"batch": _sizes(options.batch)}
        return Artefact("aotinductor", None, "fp8", REFUSED, reason, details=details)
    artefact = _compiled(options, source, quantized, "fp8", {**notes, "fp8_layers": ranges})
    judgement = judge(
        source.onnx,
        source.folder / artefact.path,
        images,
        budget=options.fp8_budget,
        batch=options.batch.opt,
        rival=("bf16", source.folder / rival),
        cuda_graph=True,  # whose speed is the GPU's, not the host's
    )
    return _accepted(artefact, judgement, source)


def _quantized(options: EngineOptions, source: Source) -> Artefact:
    _check_images_alone("--int8", source)
    path, images = source.folder / f"{source.onnx.stem}.int8.onnx", source.images()
    quantize_int8(source.onnx, path, images, _device())
    judgement = judge(
        source.onnx, path, images, budget=options.int8_budget, batch=options.batch.opt
    )
    return _accepted(
        _artefact("onnx", path, "int8", {"batch": _sizes(options.batch)}), judgement, source
    )


def _check_images_alone(flag: str, source: Source) -> None:
    if not source.classes:
        raise InputError(f"{flag} is judged by its accuracy, and this model has no classes")
    if len(source.inputs) > 1:
        raise InputError(f"{flag} takes models whose only input is images")


def _accepted(artefact: Artefact, judgement: Judgement, source: Source) -> Artefact:
    """An 8-bit file after its gate; if it is refused, its files are deleted."""
    details = {**artefact.details, "judgement": judgement.to_dict()}
    artefact = replace(artefact, details=details)
    if not judgement.problems:
        found = _checked(artefact, source, exact=None)
        if found.status == VERIFIED:
            return found
        problems: tuple[str, ...] = (found.reason,)
        artefact = replace(artefact, parity=found.parity)
    else:
        problems = judgement.problems
    for file in artefact.files:
        (source.folder / file).unlink()
    reason = "; ".join(problems)
    return replace(artefact, path=None, status=REFUSED, reason=reason, files=())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sizes(batch: Batches) -> dict[str, int]:
    return {"min": batch.min, "opt": batch.opt, "max": batch.max}


def _tell(console: Console, artefact: Artefact) -> None:
    mark = {VERIFIED: "[green]✓[/]", UNVERIFIED: "[yellow]?[/]"}.get(artefact.status, "[red]✗[/]")
    name = artefact.path or f"{artefact.kind} in {artefact.precision}"
    reason = f": {artefact.reason}" if artefact.reason else ""
    console.print(f"{mark} {name} {artefact.status}{reason}", highlight=False)
