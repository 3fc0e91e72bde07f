"""The runtimes of phones and boards: ExecuTorch, LiteRT and Core ML."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fastadapt.errors import InputError, first_line

from .backends.coreml import load_coremltools
from .backends.executorch import METHOD, load_executorch
from .backends.litert import load_litert
from .backends.tracing import silent_stderr
from .runtime import CORE_ML, Runtime, RuntimeUnavailable, usable_cores


class ExecuTorchRuntime(Runtime):
    """ExecuTorch with XNNPACK. Its threads are the process's: the last file loaded sets them."""

    device = "cpu"
    name = "ExecuTorch, CPU"
    providers = ("XNNPACK", "ExecuTorch")

    def __init__(self, path: Path, *, threads: int | None = None):
        try:
            with silent_stderr():
                runtime = load_executorch(threads or usable_cores())
        except InputError as error:
            raise RuntimeUnavailable(f"{path.name} cannot run here: {error}") from error
        try:
            self._program = runtime.Runtime.get().load_program(path)  # checks its tables
            self._method = self._program.load_method(METHOD)
        except Exception as error:  # RuntimeErrors, with a number as the reason
            raise InputError(f"ExecuTorch cannot load {path.name}: {first_line(error)}") from error

    def run_tensors(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run tensors where they are; results are copies."""
        return tuple(self._method.execute(inputs))


class LiteRtRuntime(Runtime):
    """LiteRT with XNNPACK, one image at a time."""

    device = "cpu"
    name = "LiteRT, CPU"
    providers = ("XNNPACK", "LiteRT")

    def __init__(self, path: Path, *, threads: int | None = None):
        try:
            library = load_litert()
        except InputError as error:
            raise RuntimeUnavailable(f"{path.name} cannot run here: {error}") from error
        with silent_stderr():
            try:
                self._interpreter = library.Interpreter(
                    str(path), num_threads=threads or usable_cores()
                )
                self._interpreter.allocate_tensors()
                (signature,) = self._interpreter.get_signature_list().values()
            except Exception as error:  # ValueErrors and RuntimeErrors
                raise InputError(f"LiteRT cannot load {path.name}: {first_line(error)}") from error
        self._runner = self._interpreter.get_signature_runner()
        self._inputs = sorted(signature["inputs"], key=_number)
        self._outputs = sorted(signature["outputs"], key=_number)

    def run_arrays(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run arrays image by image."""
        rows = []
        for index in range(len(inputs[0])):
            image = (x[index : index + 1] for x in inputs)
            found = self._runner(**dict(zip(self._inputs, image, strict=True)))
            rows.append([found[name] for name in self._outputs])
        return tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))


class CoreMlRuntime(Runtime):
    """Core ML on a Mac, by coremltools, one image at a time."""

    device = "cpu"  # where tensors are handed over

    def __init__(self, path: Path, *, device: str = "auto"):
        if device == "cuda":
            raise RuntimeUnavailable(f"{path.name} is for Core ML, which knows no CUDA")
        if platform.system() != "Darwin":
            raise RuntimeUnavailable(f"{path.name} is for Core ML, which runs on macOS only")
        try:
            library = load_coremltools()
        except InputError as error:
            raise RuntimeUnavailable(f"{path.name} cannot run here: {error}") from error
        units = library.ComputeUnit
        try:
            self._model = library.models.MLModel(
                str(path), compute_units=units.CPU_ONLY if device == "cpu" else units.ALL
            )
            description = self._model.get_spec().description
        except Exception as error:  # the system's own
            raise InputError(f"Core ML cannot load {path.name}: {first_line(error)}") from error
        self.name = f"{CORE_ML}, CPU" if device == "cpu" else CORE_ML
        self.providers = (self.name,)
        self._inputs = [value.name for value in description.input]
        self._outputs = [value.name for value in description.output]

    def run_arrays(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """Run arrays image by image."""
        rows = []
        for index, image in enumerate(inputs[0]):
            others = (x[index : index + 1] for x in inputs[1:])
            given = dict(zip(self._inputs, (_picture(image), *others), strict=True))
            found = self._model.predict(given)
            rows.append([np.asarray(found[name], np.float32) for name in self._outputs])
        return tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))


def _picture(image: np.ndarray) -> Image.Image:
    """Make an image of uint8 [H, W, 3], or of fp32 [3, H, W] in [0, 1]."""
    if image.dtype != np.uint8:
        image = np.moveaxis(np.rint(255 * image), 0, -1).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(image))


def _number(name: str) -> int:
    """Return the place of an input or output: ``args_1``, ``output_0``."""
    return int(name.rpartition("_")[2])
