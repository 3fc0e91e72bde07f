"""INT8 after training, from the user's own images: kept if accurate and faster, else refused.

ONNX Runtime's static quantiser writes the quantisation into the graph (QDQ), where ONNX Runtime
reads it. Convolutions, and products of tokens with weights, are quantised, with a scale per output
channel; cluster attention's mixture and the head, where a few numbers decide, stay in fp32.
(NVIDIA's ModelOpt 0.47 does the same for ONNX on top of ONNX Runtime, but installs older releases
of onnx and onnxruntime over this package's, and CuPy.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastadapt.errors import counted

from ..runtimes import Runtime, load_runtime
from ..settings import Calibration
from ..speed import LEAST_SPEEDUP, format_rate, speeds_in_turns
from .quantizer import Calibrated, Quantization, calibrate

CALIBRATION_IMAGES = 128
BATCH = 8


@dataclass(frozen=True)
class TaskTargets:
    """What is known of the validation files in one of several tasks.

    Attributes:
        name: of the task; empty for a model of one.
        targets: class index of every file, -1 where it is not known in this task; ``None`` if it
            is known of none: the class that the fp32 model gives then counts as the right one.
    """

    name: str
    targets: np.ndarray | None


@dataclass(frozen=True)
class QuantizationImages:
    """The images that calibrate 8-bit files, and those that judge them; no image does both.

    Attributes:
        calibration: files, of the training split where there is one.
        validation: files.
        targets: class index of every validation file; ``None`` if not known: the class that the
            fp32 model gives then counts as the right one.
        read: reads files as the model's input.
        tasks: of a model with several tasks, in the order of its outputs; ``targets`` is then not
            used.
    """

    calibration: Sequence[Path]
    validation: Sequence[Path]
    targets: np.ndarray | None
    read: Callable[[Sequence[Path]], np.ndarray]
    tasks: tuple[TaskTargets, ...] = ()

    def batches(self, files: Sequence[Path]) -> Iterator[np.ndarray]:
        """Read files in batches."""
        for start in range(0, len(files), BATCH):
            yield self.read(files[start : start + BATCH])


@dataclass(frozen=True)
class Judgement:
    """An 8-bit file beside the one it must be as accurate as, and faster than, on one machine.

    Attributes:
        accuracy, accuracy_fp32: on the validation images.
        budget: how much accuracy may be lost.
        speed, speed_rival: images per second at ``batch``; ``None`` where accuracy alone counts.
        batch: batch size that speed was measured at.
        images: number of images that were classified.
        measured: ``"accuracy"``, or ``"agreement"`` with the fp32 model if no classes are known.
        runtime: name of the runtime.
        rival: precision of the file that it must be faster than.
        problems: why it is refused.
        task: the one that loses most, of several; the figures are its.
    """

    accuracy: float
    accuracy_fp32: float
    budget: float
    speed: float | None
    speed_rival: float | None
    batch: int
    images: int
    measured: str
    runtime: str
    rival: str = "fp32"
    problems: tuple[str, ...] = ()
    task: str = ""

    @property
    def accurate(self) -> bool:
        """Whether no more accuracy is lost than the budget allows."""
        return self.accuracy >= self.accuracy_fp32 - self.budget

    def to_dict(self) -> dict[str, Any]:
        """Return what a manifest records."""
        found = {**asdict(self), "problems": list(self.problems)}
        if not self.task:
            del found["task"]
        return found

    def __str__(self) -> str:
        accuracy = (
            f"{self.task and f'{self.task}: '}{self.measured} {self.accuracy:.2%} "
            f"(fp32 {self.accuracy_fp32:.2%}, {counted(self.images, 'image')})"
        )
        if self.speed is None or self.speed_rival is None:
            return f"{accuracy}, {self.runtime}"
        return (
            f"{accuracy}, {format_rate(self.speed)} images/s at batch {self.batch} "
            f"({self.rival} {format_rate(self.speed_rival)}, {self.runtime})"
        )


def quantize_int8(
    onnx: str | Path,
    path: str | Path,
    images: QuantizationImages,
    device: str = "cpu",
    calibration: Calibration = "max",
) -> None:
    """Write an INT8 version of an fp32 ONNX file.

    Args:
        onnx: the fp32 file.
        path: of the result.
        images: their ``calibration`` files give the ranges of the activations.
        device: where it is to run: signed and symmetric for ``"cuda"``, as GPUs need it, else
            unsigned, as x86's instructions do.
        calibration: of the activations.

    Raises:
        InputError: the quantiser fails, with its reason.
    """
    calibrate_int8(onnx, images, device, calibration).write(path)


def calibrate_int8(
    onnx: str | Path,
    images: QuantizationImages,
    device: str = "cpu",
    calibration: Calibration = "max",
) -> Calibrated:
    """Calibrate an fp32 ONNX file; arguments and errors are those of :func:`quantize_int8`."""
    gpu = device == "cuda"
    wanted = Quantization(
        "QInt8" if gpu else "QUInt8", "QInt8", calibration, options={"ActivationSymmetric": gpu}
    )
    return calibrate(onnx, images.batches(images.calibration[:CALIBRATION_IMAGES]), wanted)


def judge(
    fp32: str | Path,
    quantized: str | Path,
    images: QuantizationImages,
    *,
    budget: float,
    batch: int,
    rival: tuple[str, str | Path] | None = None,
    cuda_graph: bool = False,
) -> Judgement:
    """Measure accuracy and speed of an 8-bit file, in the runtime that serves this machine best.

    Args:
        fp32: a file of the bundle that is as accurate as the model.
        quantized: the 8-bit file.
        images: their validation files judge.
        budget: the accuracy that may be lost, 0.01 for one percentage point.
        batch: batch size, which all files take.
        rival: precision and file that it must be faster than; ``fp32`` if ``None``.
        cuda_graph: run both as CUDA graphs, if they run on a GPU.
    """
    reference, runtime = load_runtime(fp32), load_runtime(quantized, cuda_graph=cuda_graph)
    name, other = "fp32", reference
    if rival is not None:
        name, other = rival[0], load_runtime(rival[1], cuda_graph=cuda_graph)
    judgement = _judge_accuracy(reference, runtime, images, budget, batch)
    example = images.read([images.validation[i % len(images.validation)] for i in range(batch)])
    speed_rival, speed = speeds_in_turns((other, runtime), example)
    problems = judgement.problems
    if speed < LEAST_SPEEDUP * speed_rival:
        slower = (
            f"{format_rate(speed)} images/s at batch {batch} where {name} has "
            f"{format_rate(speed_rival)} ({runtime.name}): not faster"
        )
        problems = (*problems, slower)
    return replace(judgement, speed=speed, speed_rival=speed_rival, rival=name, problems=problems)


def judge_accuracy(
    fp32: str | Path,
    quantized: str | Path,
    images: QuantizationImages,
    *,
    budget: float,
    batch: int,
) -> Judgement:
    """Measure the accuracy of a quantised graph alone, in ONNX Runtime on the CPU.

    For graphs whose engine runs elsewhere: there they are judged by their speed.
    """
    reference, runtime = (load_runtime(file, device="cpu") for file in (fp32, quantized))
    return _judge_accuracy(reference, runtime, images, budget, batch)


def _judge_accuracy(
    reference: Runtime, runtime: Runtime, images: QuantizationImages, budget: float, batch: int
) -> Judgement:
    tasks = images.tasks or (TaskTargets("", images.targets),)
    answers: list[list[list[np.ndarray]]] = [[[], []] for _ in tasks]
    for start in range(0, len(images.validation), batch):
        part = images.read(images.validation[start : start + batch])
        full = np.resize(part, (batch, *part.shape[1:]))  # not every file takes fewer
        for place, model in enumerate((reference, runtime)):
            outputs = model.outputs(full)
            for found, output in zip(answers, outputs, strict=False):
                found[place].append(output[: len(part)].argmax(axis=1))
    judged = []
    for task, found in zip(tasks, answers, strict=True):
        right, got = (np.concatenate(each) for each in found)
        targets = right if task.targets is None else task.targets
        known = targets >= 0
        judged.append(
            Judgement(
                accuracy=float((got == targets)[known].mean()),
                accuracy_fp32=float((right == targets)[known].mean()),
                budget=budget,
                speed=None,
                speed_rival=None,
                batch=batch,
                images=int(known.sum()),
                measured="agreement" if task.targets is None else "accuracy",
                runtime=runtime.name,
                task=task.name,
            )
        )
    problems = tuple(
        f"{one.task and f'{one.task}: '}{one.measured} falls from {one.accuracy_fp32:.2%} to "
        f"{one.accuracy:.2%}; the budget is {100 * budget:g} percentage points"
        for one in judged
        if not one.accurate
    )
    most = max(judged, key=lambda one: one.accuracy_fp32 - one.accuracy)
    return replace(most, problems=problems)
