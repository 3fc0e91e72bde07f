"""TensorRT: an ONNX file to an engine, by TensorRT 10, TensorRT 11 or TensorRT-RTX.

Networks are strongly typed: the precision is the graph's (:mod:`fastadapt.export.precision`), never
the builder's choice. The plan is written raw, so that every tool loads it; ``ENGINE.json`` beside
it describes it.

TensorRT-RTX builds for GPUs that are not there, and runs on desktop and workstation GPUs, not on
data-centre ones like the H100. TensorRT builds for the GPU at hand, and times its choices on it.
"""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fastadapt.errors import InputError
from fastadapt.files import atomic_path, sha256_file, write_json

from ..settings import DEFAULT_BATCHES, Batches

MODULES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx"}
NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
REMEDY = (
    "install TensorRT-RTX, which builds without a GPU (pip install 'fastadapt[trt-rtx]'), or, "
    "for the GPU at hand, TensorRT (pip install 'fastadapt[trt]', from NVIDIA's index)"
)
# What TensorRT-RTX runs on; Hopper and data-centre Blackwell are not among them.
RTX_SERVES = ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built.

    Attributes:
        batch: the optimisation profile.
        targets: GPUs that TensorRT-RTX builds for, ``"sm_89"`` for one; none: the one at hand, or
            without a GPU all that it knows from Ampere on.
        workspace: largest workspace of a layer in MiB; TensorRT's own limit if ``None``.
        hardware_compatible: TensorRT only: runs on all GPUs from Ampere on, at some cost of speed.
        version_compatible: TensorRT only: runs with later versions of it, too.
        timing_cache: file of TensorRT's timings; ``None`` for one in the user's cache folder.
    """

    batch: Batches = DEFAULT_BATCHES
    targets: tuple[str, ...] = ()
    workspace: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries, as it is installed here.

    Attributes:
        kind: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        module: the Python module.
    """

    kind: str
    module: ModuleType

    @property
    def name(self) -> str:
        """The library's name, as NVIDIA writes it."""
        return NAMES[self.kind]

    @property
    def version(self) -> str:
        """The installed version."""
        return self.module.__version__


def load_flavour(kind: str) -> Flavour | None:
    """Import the library; ``None`` if it is not installed or does not load."""
    try:
        return Flavour(kind, importlib.import_module(MODULES[kind]))
    except (ImportError, OSError):  # the bindings without their libraries
        return None


def gpu() -> tuple[str, tuple[int, int]] | None:
    """Return name and compute capability of the GPU at hand, ``None`` without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability()


def choose_flavour(config: EngineConfig) -> Flavour:
    """Choose the library that builds here: TensorRT where there is a GPU and no target is named.

    Raises:
        InputError: no library is installed that serves the GPU or the targets; with the remedy.
    """
    device = gpu()
    full, rtx = load_flavour("tensorrt"), load_flavour("tensorrt_rtx")
    if full is None and rtx is None:
        raise InputError(f"`trt`: neither TensorRT nor TensorRT-RTX is installed here: {REMEDY}")
    if full is not None and device is not None and not config.targets:
        return full
    if rtx is None:
        assert full is not None
        why = "`targets` names GPUs" if config.targets else "there is no GPU here"
        raise InputError(
            f"`trt`: {why}, and TensorRT {full.version} builds only for the GPU at hand: install "
            "TensorRT-RTX, which builds for others (pip install 'fastadapt[trt-rtx]')"
        )
    for flag in ("hardware_compatible", "version_compatible"):
        if getattr(config, flag):
            raise InputError(
                f"`{flag}` is TensorRT's; TensorRT-RTX builds for the GPUs of "
                "`targets` and for its own version: leave it out"
            )
    if device is not None and not config.targets and device[1] not in RTX_SERVES:
        name, (major, minor) = device
        raise InputError(
            f"`trt`: TensorRT-RTX does not run on this GPU, {name} (compute capability "
            f"{major}.{minor}): install TensorRT (pip install 'fastadapt[trt]', from NVIDIA's "
            "index), or name the GPU that the engine is for, `targets=sm_89` for one"
        )
    _capabilities(rtx, _targets(rtx, config))
    return rtx


def build_engine(
    onnx: str | Path,
    path: str | Path,
    config: EngineConfig = EngineConfig(),
    *,
    flavour: Flavour | None = None,
    precision: str = "fp32",
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the engine of an ONNX file, and ``path`` + ``.json`` beside it.

    Args:
        onnx: a file with a dynamic batch, in any precision.
        path: of the raw plan.
        config: how the engine is built.
        flavour: the library that builds it; :func:`choose_flavour`'s choice if ``None``.
        precision: of the graph. TF32 is used for ``"bf16"`` and ``"fp16"`` graphs only.
        console: where progress is shown.

    Returns:
        The content of the JSON file: library, version, profile, targets, inputs, outputs, layers
        and their summary (:func:`summarize`).

    Raises:
        InputError: no library, a target that it does not know, an operator that it does not take,
            or a build that fails; with the library's own reason.
    """
    onnx, path = Path(onnx), Path(path)
    flavour = flavour or choose_flavour(config)
    trt = flavour.module
    log = logger(trt)
    log.messages.clear()
    builder = trt.Builder(log)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        reason = parser.get_error(0).desc() if parser.num_errors else log.reason
        raise InputError(f"{flavour.name} {flavour.version} cannot read {onnx.name}: {reason}")

    settings = builder.create_builder_config()
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if precision == "fp32":
        settings.clear_flag(trt.BuilderFlag.TF32)
    if config.workspace is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace << 20)
    if config.version_compatible:
        settings.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if config.hardware_compatible:
        settings.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    targets = _targets(flavour, config)
    if flavour.kind == "tensorrt_rtx":
        settings.num_compute_capabilities = len(targets)
        for index, capability in enumerate(_capabilities(flavour, targets)):
            settings.set_compute_capability(capability, index)
    profile = builder.create_optimization_profile()
    batch = config.batch
    for images in (network.get_input(i) for i in range(network.num_inputs)):
        sizes = tuple(images.shape)[1:]
        profile.set_shape(images.name, *((n, *sizes) for n in (batch.min, batch.opt, batch.max)))
    settings.add_optimization_profile(profile)
    cache = _timing_cache(flavour, config, settings)

    with _progress(console, f"build {path.name}") as progress:
        monitor = _monitor(trt, progress)
        settings.progress_monitor = monitor
        plan = builder.build_serialized_network(network, settings)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise InputError(f"{flavour.name} {flavour.version} cannot build {onnx.name}: {log.reason}")
    with atomic_path(path) as temporary:
        temporary.write_bytes(plan)
    _keep_timing_cache(cache, settings)
    layers = _inspect(trt, log, plan) or parse_layers(log.layers)
    details = {
        "library": flavour.name,
        "kind": flavour.kind,
        "version": flavour.version,
        "precision": precision,
        "batch": batch.to_dict(),
        "targets": targets,
        "workspace": config.workspace,
        "version_compatible": config.version_compatible,
        "hardware_compatible": config.hardware_compatible,
        "onnx": onnx.name,
        "onnx_sha256": sha256_file(onnx),
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "summary": summarize(layers, precision),
        "layers": layers,
    }
    write_json(path.with_name(f"{path.name}.json"), details)
    return details


def _sm(capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*capability)


def _known(flavour: Flavour) -> dict[str, Any]:
    """Return the GPUs that the library builds for, by name, as its own values."""
    members = flavour.module.ComputeCapability.__members__.items()
    return {f"sm_{name[2:]}": value for name, value in members if name.startswith("SM")}


def _targets(flavour: Flavour, config: EngineConfig) -> list[str]:
    """Return the targets asked for, else the GPU at hand, else all known from Ampere on."""
    device = gpu()
    if config.targets:
        return list(config.targets)
    return [sm for sm in _known(flavour) if sm != "sm_75"] if device is None else [_sm(device[1])]


def _capabilities(flavour: Flavour, targets: Sequence[str]) -> list[Any]:
    """Translate targets to the library's values; raise InputError for one it does not know."""
    known = _known(flavour)
    for target in targets:
        if target not in known:
            raise InputError(
                f"targets is {target!r}; {flavour.name} {flavour.version} builds for "
                f"{', '.join(known)}"
            )
    return [known[target] for target in targets]


def _tensor(tensor: Any) -> dict[str, Any]:
    shape = ["batch" if size < 0 else int(size) for size in tensor.shape]
    return {"name": tensor.name, "dtype": _DTYPES[tensor.dtype.name], "shape": shape}


# The layers are listed by the engine inspector, which needs a GPU that loads the engine, and
# otherwise by the builder's log, which ends with the same list.

_DTYPES = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "BFLOAT16": "bf16",
    "INT8": "int8",
    "FP8": "fp8",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def _inspect(trt: ModuleType, log: Any, plan: Any) -> list[dict[str, Any]]:
    if gpu() is None:
        return []
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return []
    inspector = engine.create_engine_inspector()
    return parse_layers(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE))


def parse_layers(text: str) -> list[dict[str, Any]]:
    """Parse the lines of the engine inspector's layer list.

    Each layer has ``name``, ``type``, ``inputs`` and ``outputs`` (dtypes) and ``onnx`` (the names
    of the graph's nodes that it computes).
    """
    layers = []
    for line in text.splitlines():
        found = re.match(r"Name: (.*?), LayerType: (\w+), ", line)
        if not found:
            continue
        before, _, after = line.partition(", Outputs: [")
        inputs = before.partition(", Inputs: [")[2].partition(", Constants: [")[0]
        outputs, _, metadata = after.partition("], TacticName: ")
        layers.append(
            {
                "name": found[1],
                "type": found[2],
                "inputs": _dtypes(inputs),
                "outputs": _dtypes(outputs),
                "onnx": re.findall(r"\[ONNX Layer: (.*?)\]", metadata),
            }
        )
    return layers


def _dtypes(text: str) -> list[str]:
    names = re.findall(r"(?:Datatype|Format/Datatype): (\w+)", text)
    return [_DTYPES.get(name.upper(), name.lower()) for name in names]


def summarize(layers: Sequence[dict[str, Any]], precision: str) -> dict[str, Any]:
    """Summarize an engine's layers: their precision, their fusions, and those left in fp32.

    Returns:
        ``layers``: number of layers; ``precision``: number by kind of layer and dtype of its
        output; ``fused``: layers that compute several of the graph's nodes, with these; ``fp32``:
        in an engine of half precision, the layers with fp32 output. LayerNorm's statistics and
        cluster attention's mixture belong there; products of matrices should not.
    """
    kinds: dict[str, Counter] = {}
    for layer in layers:
        dtype = layer["outputs"][0] if layer["outputs"] else "none"
        kinds.setdefault(layer["type"], Counter())[dtype] += 1
    return {
        "layers": len(layers),
        "precision": {kind: dict(counts) for kind, counts in sorted(kinds.items())},
        "fused": {layer["name"]: layer["onnx"] for layer in layers if len(set(layer["onnx"])) > 1},
        "fp32": [
            {"name": layer["name"], "type": layer["type"], "onnx": layer["onnx"]}
            for layer in layers
            if precision != "fp32" and "fp32" in layer["outputs"]
        ],
    }


# The timing cache only saves time: TensorRT-RTX has none, and a damaged one is not used.


def _timing_cache(flavour: Flavour, config: EngineConfig, settings: Any) -> Path | None:
    if flavour.kind != "tensorrt":
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastadapt"
    device = gpu()
    name = f"timing-{flavour.version}-{_sm(device[1]) if device else 'none'}.cache"
    path = config.timing_cache or folder / name
    known = path.read_bytes() if path.is_file() else b""
    cache = settings.create_timing_cache(known) or settings.create_timing_cache(b"")
    settings.set_timing_cache(cache, ignore_mismatch=False)
    return path


def _keep_timing_cache(path: Path | None, settings: Any) -> None:
    cache = settings.get_timing_cache() if path is not None else None
    if path is None or cache is None:
        return
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(cache.serialize())
    except OSError:  # without it the next build takes longer, no more
        pass


# TensorRT keeps the first logger of a process for all that follows.
_loggers: dict[str, Any] = {}


def logger(trt: Any) -> Any:
    """Return the process's one logger for a library."""
    if trt.__name__ not in _loggers:

        class Logger(trt.ILogger):
            """Keep errors and the layer list; print nothing."""

            def __init__(self):
                trt.ILogger.__init__(self)
                self.messages: list[tuple[Any, str]] = []

            def log(self, severity, message):
                serious = severity in (self.ERROR, self.INTERNAL_ERROR)
                if serious or "LayerType: " in message:
                    self.messages.append((severity, message))

            @property
            def reason(self) -> str:
                """Return the first error, in one line."""
                texts = [m for severity, m in self.messages if "LayerType: " not in m]
                return " ".join(texts[0].split()) if texts else "it gives no reason"

            @property
            def layers(self) -> str:
                return "\n".join(m for _, m in self.messages if "LayerType: " in m)

        _loggers[trt.__name__] = Logger()
    return _loggers[trt.__name__]


def _progress(console: Console | None, description: str) -> Progress:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console is None or not console.is_terminal,
        transient=True,
    )
    progress.add_task(description, total=1.0)
    return progress


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Show nested phases as one fraction, and let Ctrl-C end the build."""

        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list] = {}  # name to [parent, steps, steps done]
            self.done = 0.0
            self.interrupted = False

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.phases[phase_name] = [parent_phase, max(num_steps, 1), 0]

        def step_complete(self, phase_name, step):
            try:
                self.phases[phase_name][2] = step + 1
                self.show(phase_name)
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name):
            try:
                self.phases.pop(phase_name, None)
                self.show(phase_name, fraction=0.0 if self.phases else 1.0)
            except KeyboardInterrupt:
                self.interrupted = True

        def show(self, name, fraction=0.0):
            while name in self.phases:
                name, steps, done = self.phases[name]
                fraction = min(1.0, (done + fraction) / steps)
            self.done = max(self.done, fraction)  # a phase may start over
            progress.update(progress.task_ids[0], completed=self.done)

    return Monitor()
