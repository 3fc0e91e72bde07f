"""Which files a bundle gets beside ``model.onnx``, and how they are built."""

from __future__ import annotations

from fastadapt.errors import InputError

from ..backends import aotinductor, coreml, executorch, litert, openvino, tensorrt
from ..precision import fp8, qdq
from ..settings import EngineSettings


class EngineOptions(EngineSettings):
    """The files that are built beside the fp32 ONNX file, and whether they can be built here."""

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

    @property
    def fp8_pt2(self) -> bool:
        """Whether a .pt2 in FP8 is asked for."""
        return self.fp8 and self.aoti and self.precision == "bf16"

    def check(self) -> None:
        """Raise InputError, before any work, for what cannot be done here; with the remedy."""
        for flag in ("targets", "workspace", "hardware_compatible", "version_compatible"):
            if getattr(self, flag) and not self.trt:
                raise InputError(f"`{flag}` is for TensorRT engines: add `trt=True`")
        if self.calibration != "max" and not self.int8:
            raise InputError("`calibration` is of INT8: add `int8=True`")
        if self.trt:
            tensorrt.choose_flavour(self.tensorrt)
        if self.fp8 and not (self.trt or self.fused or self.fp8_pt2):
            raise InputError(
                "`fp8` is made for fastadapt's own operations (`fused=True`), for TensorRT "
                "(`trt=True`), or from the .pt2's model in bf16, and judged beside it: add "
                "`aoti=True` `precision='bf16'`"
            )
        if self.fp8_pt2 or (self.fp8 and self.fused):
            fp8.check_gpu()
        if self.fp8 and self.trt:
            qdq.check_fp8()
        if self.openvino:
            openvino.check_installed(self.int8)
        if self.executorch:
            executorch.check_installed(self.int8)
        if self.litert:
            litert.check_installed(self.int8)
        if self.coreml:
            others = self.trt or self.openvino or self.executorch or self.litert
            if self.int8 and not others:
                raise InputError(
                    "`int8` is not made for Core ML, which runs on Macs alone and cannot be judged "
                    "here: leave out `int8`, or add the runtime that it is for"
                )
            coreml.load_coremltools()
        if self.aoti:
            aotinductor.check_compiler()
