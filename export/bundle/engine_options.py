"""Which files a bundle gets beside ``model.onnx``, and how they are built."""

from __future__ import annotations

from dataclasses import dataclass

from fastadapt.errors import InputError

from ..artefact import DEFAULT_BATCHES, Batches
from ..backends import aotinductor, tensorrt
from ..precision import fp8, half


@dataclass(frozen=True)
class EngineOptions:
    """What is to be built beside the fp32 ONNX file.

    Attributes:
        trt: a TensorRT or TensorRT-RTX engine.
        aoti: AOTInductor's .pt2.
        int8: an ONNX file in INT8, if it proves accurate and fast.
        fp8: a .pt2 in FP8 beside one in bf16, if it proves accurate and fast.
        precision: of ONNX file, engine and .pt2: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        batch: the batch sizes they are built and checked for.
        targets, workspace, hardware_compatible, version_compatible: as for
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
        """The options of the TensorRT engine."""
        return tensorrt.EngineConfig(
            batch=self.batch,
            targets=self.targets,
            workspace=self.workspace,
            hardware_compatible=self.hardware_compatible,
            version_compatible=self.version_compatible,
        )

    def check(self) -> None:
        """Raise InputError, before any work, for what cannot be done here; with the remedy."""
        if self.precision not in ("fp32", *half.DTYPES):
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
