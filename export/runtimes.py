"""What runs a bundle's files: ONNX Runtime, OpenVINO, AOTInductor, TensorRT, ours, and edge ones.

>>> runtime = load_runtime("bundle/model.onnx")
>>> logits = runtime(images)  # numpy in, numpy out; tensor in, tensor out on its device
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadapt.cuda_graph import GraphedCall
from fastadapt.errors import InputError, first_line
from fastadapt.files import read_json

from .artefact import FOLDERS
from .edge_runtimes import CoreMlRuntime, ExecuTorchRuntime, LiteRtRuntime
from .runtime import Runtime, RuntimeUnavailable, usable_cores

SUFFIXES = {
    ".onnx": "onnx",
    ".pt2": "aotinductor",
    ".engine": "tensorrt",
    ".xml": "openvino",
    ".pte": "executorch",
    ".tflite": "litert",
    ".mlpackage": "coreml",
    ".safetensors": "fastadapt",
}
DEVICES = ("auto", "cpu", "cuda")


def load_runtime(
    path: str | Path,
    kind: str | None = None,
    *,
    device: str = "auto",
    cuda_graph: bool = False,
    threads: int | None = None,
) -> Runtime:
    """Load a file of a bundle.

    Args:
        path: ``.onnx``, ``.xml`` with the ``.bin`` beside it, ``.pte``, ``.tflite``, ``.pt2``,
            ``.safetensors`` or ``.engine`` with the ``.json`` beside it, or a folder
            ``.mlpackage``.
        kind: ``"onnx"``, ``"openvino"``, ``"executorch"``, ``"litert"``, ``"coreml"``,
            ``"aotinductor"``, ``"fastadapt"``, ``"tensorrt"`` or ``"tensorrt_rtx"``; by the suffix
            and the file beside it if ``None``.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU if there is one.
        cuda_graph: on a GPU, capture a graph per batch size and replay it: for small batches,
            where launching kernels takes most of the time. Each batch size costs a capture.
            AOTInductor and TensorRT capture the first eight sizes; a model that cannot be captured
            runs without, with a warning. fastadapt's own runtime always captures them.
        threads: on a CPU; the cores that this process may use if ``None``.

    Raises:
        RuntimeUnavailable: this machine cannot run it.
        InputError: the file is missing, damaged or of no known kind.
    """
    path = Path(path)
    if device not in DEVICES:
        raise InputError(f"device is {device!r}; expected one of {', '.join(DEVICES)}")
    kind = kind or SUFFIXES.get(path.suffix)
    if not (path.is_dir() if kind in FOLDERS else path.is_file()):
        raise InputError(f"{path} does not exist")
    if kind is None:
        raise InputError(f"{path} is no model; expected {', '.join(SUFFIXES)}")
    if kind == "onnx":
        return OnnxRuntime(path, device=device, cuda_graph=cuda_graph, threads=threads)
    if kind in ON_CPUS:
        library, runtime = ON_CPUS[kind]
        if device == "cuda":
            raise RuntimeUnavailable(f"{path.name} is for {library}, which runs it on the CPU")
        return runtime(path, threads=threads)
    if kind == "coreml":
        return CoreMlRuntime(path, device=device)
    details = read_json(path.with_name(f"{path.name}.json"))
    if kind == "aotinductor":
        return AotiRuntime(path, details, device=device, cuda_graph=cuda_graph)
    if kind == "fastadapt":
        return FusedRuntime(path, details, device=device)
    if device == "cpu":
        raise RuntimeUnavailable(f"{path.name} is a TensorRT engine, which runs on a GPU only")
    return TensorRTRuntime(path, details, cuda_graph=cuda_graph)


class OnnxRuntime(Runtime):
    """ONNX Runtime with its CUDA provider where there is a GPU, else on the CPU.

    On a GPU, tensors are bound where they are, without copies. With CUDA graphs there is a session
    per batch size: shapes must be fixed then, and known to the graph.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        cuda_graph: bool = False,
        threads: int | None = None,
    ):
        import onnxruntime

        available = onnxruntime.get_available_providers()
        usable = "CUDAExecutionProvider" in available and torch.cuda.is_available()
        if device == "cuda" and not usable:
            why = "there is no GPU" if not torch.cuda.is_available() else "it has no CUDA provider"
            raise RuntimeUnavailable(f"ONNX Runtime cannot run {path.name} on a GPU: {why}")
        self.path = path
        self.threads = threads or usable_cores()
        self._sessions: dict[int | None, Any] = {}
        self._fixed: dict[int, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._open("cuda" if usable and device != "cpu" else "cpu")
        if self.device == "cuda" and self.providers[0] != "CUDAExecutionProvider":
            if device == "cuda":
                raise RuntimeUnavailable(
                    f"ONNX Runtime's CUDA provider does not load here: {_why_no_cuda(onnxruntime)}"
                )
            self._open("cpu")
        self.cuda_graph = cuda_graph and self.device == "cuda"

    def _open(self, device: str) -> None:
        self._sessions.clear()
        self.device, self.name = device, f"ONNX Runtime, {device.upper()}"
        if device == "cuda":
            with contextlib.suppress(RuntimeError):  # where CUDA fails, so does the session
                self._stream = torch.cuda.Stream()
        session = self._session(None)
        self.providers = tuple(session.get_providers())
        self.inputs, self._outputs = session.get_inputs(), session.get_outputs()

    def _session(self, batch: int | None) -> Any:
        """Return a session for any batch size, or for one (with CUDA graphs)."""
        if batch not in self._sessions:
            self._sessions[batch] = self._new_session(batch)
        return self._sessions[batch]

    def _new_session(self, batch: int | None, fuse_quantized: bool = True) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if not fuse_quantized:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.log_severity_level = 4
        if self.device == "cuda":
            _preload(onnxruntime)
            graph = "0" if batch is None else "1"
            settings = {**CUDA_SETTINGS, "enable_cuda_graph": graph}
            if self._stream is not None:
                settings["user_compute_stream"] = str(self._stream.cuda_stream)
            providers = [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]
        else:
            options.intra_op_num_threads = self.threads
            providers = ["CPUExecutionProvider"]
        if batch is not None:
            options.add_free_dimension_override_by_name(self.inputs[0].shape[0], batch)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # where it prints its own retries
                session = onnxruntime.InferenceSession(str(self.path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's own exceptions have no common base
            reason = first_line(error)
            if fuse_quantized and "float8" in reason:  # its fused products are for integers only
                return self._new_session(batch, fuse_quantized=False)
            if type(error).__name__ == "NotImplemented":  # bf16 on a CPU
                raise RuntimeUnavailable(f"{self.name} cannot run this graph: {reason}") from error
            message = f"ONNX Runtime cannot load {self.path.name}: {reason}"
            raise InputError(message) from error
        session.disable_fallback()  # it would go on on the CPU where the GPU fails
        return session

    def run_arrays(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run arrays; ONNX Runtime copies them to the GPU and back."""
        if self.cuda_graph:
            return super().run_arrays(*inputs)
        named = {value.name: x for value, x in zip(self.inputs, inputs, strict=True)}
        return tuple(self._session(None).run([value.name for value in self._outputs], named))

    def run_tensors(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run tensors where they are, without copies."""
        if self.device == "cpu":
            return super().run_tensors(*inputs)
        if self.cuda_graph:
            return self._replay(inputs)
        outputs = self._empty(len(inputs[0]))
        self._run_bound(self._session(None), inputs, outputs)
        return outputs

    def _replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Copy inputs to the addresses that the graph was captured with, and replay it."""
        batch = len(inputs[0])
        if batch not in self._fixed:
            self._fixed[batch] = tuple(x.clone() for x in inputs), self._empty(batch)
        fixed, outputs = self._fixed[batch]
        for own, x in zip(fixed, inputs, strict=True):
            own.copy_(x)
        self._run_bound(self._session(batch), fixed, outputs)
        return tuple(output.clone() for output in outputs)

    def _run_bound(
        self, session: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
    ) -> None:
        binding = session.io_binding()
        pairs = [(binding.bind_output, *pair) for pair in zip(self._outputs, outputs, strict=True)]
        pairs += [(binding.bind_input, *pair) for pair in zip(self.inputs, inputs, strict=True)]
        for bind, value, x in pairs:
            shape, device = list(x.shape), x.device.index or 0
            bind(value.name, "cuda", device, _NUMPY[x.dtype], shape, x.data_ptr())
        import onnxruntime

        assert self._stream is not None
        options = onnxruntime.RunOptions()
        # The host goes on; what uses the outputs waits on the GPU.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        session.run_with_iobinding(binding, options)
        current.wait_stream(self._stream)
        for x in (*inputs, *outputs):
            x.record_stream(self._stream)  # its memory is not given to others before

    def _empty(self, batch: int) -> tuple[Tensor, ...]:
        shapes = [(batch, *value.shape[1:]) for value in self._outputs]
        return tuple(torch.empty(shape, device="cuda") for shape in shapes)


# Heuristics instead of a search among cuDNN's algorithms for each shape, which took ConvNeXt-B
# minutes at five batch sizes.
CUDA_SETTINGS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.uint8: np.uint8}


def _preload(onnxruntime: Any) -> None:
    """Load CUDA's libraries where the system has none: those of PyTorch or of packages."""
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def _why_no_cuda(onnxruntime: Any) -> str:
    """Return the linker's reason, which ONNX Runtime writes to its log only."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        for name in ("shared", "cuda"):
            library = folder / f"libonnxruntime_providers_{name}.so"
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return first_line(error)
    return "no reason given (its CUDA or cuDNN may be of another version than the installed one)"


class OpenVinoRuntime(Runtime):
    """OpenVINO on the CPU. Its plans for batch sizes that it has seen are kept."""

    device = "cpu"
    name = "OpenVINO, CPU"
    providers = ("OpenVINO",)

    def __init__(self, path: Path, *, threads: int | None = None):
        from .backends.openvino import load_openvino

        try:
            openvino = load_openvino()
        except InputError as error:
            raise RuntimeUnavailable(f"{path.name} cannot run here: {error}") from error
        settings = {
            "INFERENCE_NUM_THREADS": threads or usable_cores(),
            "PERFORMANCE_HINT": "LATENCY",  # all threads compute one batch
            "INFERENCE_PRECISION_HINT": "f32",  # it would take bf16 where the CPU has it
        }
        try:
            model = openvino.Core().compile_model(str(path), "CPU", settings)
        except Exception as error:  # RuntimeErrors, with the place in OpenVINO's code
            raise InputError(f"OpenVINO cannot load {path.name}: {first_line(error)}") from error
        self._request = model.create_infer_request()

    def run_arrays(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run arrays where they are; results are copied from the buffers that it reuses."""
        found = self._request.infer(list(inputs), share_inputs=True)
        return tuple(found[index].copy() for index in range(len(found)))


# Kinds that run on CPUs alone: the library, and its class.
ON_CPUS: dict[str, tuple[str, Callable[..., Runtime]]] = {
    "openvino": ("OpenVINO", OpenVinoRuntime),
    "executorch": ("ExecuTorch", ExecuTorchRuntime),
    "litert": ("LiteRT", LiteRtRuntime),
}


class AotiRuntime(Runtime):
    """AOTInductor's .pt2, which holds native code for one kind of device."""

    def __init__(self, path: Path, details: dict[str, Any], *, device: str, cuda_graph: bool):
        from .backends.aotinductor import no_probes, target

        made_for = details["targets"][0]
        self.device = "cpu" if made_for.startswith("cpu") else "cuda"
        if device not in ("auto", self.device):
            raise RuntimeUnavailable(f"{path.name} was compiled for {made_for}, not for {device}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeUnavailable(f"{path.name} was compiled for {made_for}; there is no GPU")
        if target(self.device) != made_for:
            raise RuntimeUnavailable(
                f"{path.name} was compiled for {made_for}; this is {target(self.device)}"
            )
        if _release(torch.__version__) != _release(details["version"]):
            raise RuntimeUnavailable(
                f"{path.name} was compiled by PyTorch {details['version']}; this is "
                f"{torch.__version__}"
            )
        try:
            # Its locks ask for events, which a graph that is being captured does not allow.
            with no_probes(vectors=self.device == "cpu"):
                self._model = torch._inductor.aoti_load_package(
                    str(path), run_single_threaded=cuda_graph
                )
        except Exception as error:
            raise InputError(f"{path.name} cannot be loaded: {first_line(error)}") from error
        self.name = f"AOTInductor, {self.device.upper()}"
        self.providers = ("AOTInductor",)
        graphed = cuda_graph and self.device == "cuda"
        self._graphs = GraphedCall(self._model, say=warnings.warn) if graphed else None

    @torch.no_grad()
    def run_tensors(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the compiled model, or replay its graph."""
        run: Callable[..., Any] = self._graphs or self._model
        return _all(run(*inputs))


class FusedRuntime(Runtime):
    """Fastadapt's own operations; on a GPU a CUDA graph for each batch size."""

    def __init__(self, path: Path, details: dict[str, Any], *, device: str):
        from .backends.fastadapt import load_fused

        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeUnavailable(f"{path.name} cannot run on a GPU; there is none")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = device
        self._model, self.name = load_fused(path, details, device)
        self.providers = ("fastadapt",)
        graphed = device == "cuda"
        self._graphs = GraphedCall(self._model, say=warnings.warn) if graphed else None

    def run_tensors(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the operations, or replay their graph."""
        run: Callable[..., Any] = self._graphs or self._model
        return _all(run(*inputs))


class TensorRTRuntime(Runtime):
    """An engine of TensorRT or TensorRT-RTX, on the current CUDA stream."""

    device = "cuda"

    def __init__(self, path: Path, details: dict[str, Any], *, cuda_graph: bool):
        from .backends.tensorrt import RTX_SERVES, load_flavour, logger

        kind, name = details["kind"], f"{details['library']} {details['version']}"
        if not torch.cuda.is_available():
            raise RuntimeUnavailable(f"{path.name} needs a GPU ({', '.join(details['targets'])})")
        capability = torch.cuda.get_device_capability()
        if kind == "tensorrt_rtx" and capability not in RTX_SERVES:
            raise RuntimeUnavailable(
                f"TensorRT-RTX does not run on {torch.cuda.get_device_name()} (compute capability "
                "{}.{})".format(*capability)
            )
        flavour = load_flavour(kind)
        if flavour is None:
            raise RuntimeUnavailable(f"{details['library']} is not installed here")
        trt = flavour.module
        self._log = logger(trt)
        self._log.messages.clear()
        self._runtime = trt.Runtime(self._log)
        plan = path.read_bytes()
        if kind == "tensorrt_rtx":
            validity, _ = self._runtime.get_engine_validity(plan)
            if validity == trt.EngineValidity.INVALID:
                raise RuntimeUnavailable(
                    f"{path.name} ({name}, for {', '.join(details['targets'])}) is not for this "
                    f"GPU, or not for {flavour.name} {flavour.version}"
                )
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise RuntimeUnavailable(
                f"{flavour.name} {flavour.version} cannot load {path.name} ({name}): "
                f"{self._log.reason}"
            )
        self._context = self._engine.create_execution_context()
        self._inputs = [value["name"] for value in details["inputs"]]
        self._outputs = [value["name"] for value in details["outputs"]]
        self.name = flavour.name
        self.providers = (flavour.name,)
        self._graphs = GraphedCall(self._enqueue, say=warnings.warn) if cuda_graph else None

    def run_tensors(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Enqueue the engine, or replay its graph."""
        run: Callable[..., Any] = self._graphs or self._enqueue
        return _all(run(*inputs))

    def _enqueue(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        context = self._context
        for name, x in zip(self._inputs, inputs, strict=True):
            if not context.set_input_shape(name, tuple(x.shape)):
                raise RuntimeError(f"shape {tuple(x.shape)} is outside the engine's profile")
            context.set_tensor_address(name, x.data_ptr())
        outputs = []
        for name in self._outputs:
            outputs.append(torch.empty(tuple(context.get_tensor_shape(name)), device=self.device))
            context.set_tensor_address(name, outputs[-1].data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError(self._log.reason)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _all(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _release(version: str) -> str:
    return version.partition("+")[0]
