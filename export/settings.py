"""The settings of an export: what is exported, into which files, and how it is compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastadapt.errors import InputError
from fastadapt.settings import Setting, Settings

MODEL, COMPARISON, INPUT, BUNDLE = "Model", "Comparison", "The graph's input", "Bundle"
ENGINES = "Engines"
GDPL = "GDPL runs"
Calibration = Literal["max", "entropy"]
MOST_IMAGES = 4096  # of a batch
# From opset 20 on, LayerNormalization and Gelu are one operator each; from 23 on, attention is one,
# too, which not every runtime takes.
OPSET = 20


@dataclass(frozen=True)
class Batches(Settings):
    """The batch sizes that an engine is built and tuned for: ``MIN:OPT:MAX``."""

    min: Annotated[
        int, Setting("Smallest batch that the engine takes.", ge=1, limit=MOST_IMAGES)
    ] = 1
    opt: Annotated[int, Setting("Batch that it is tuned for.", ge=1, limit=MOST_IMAGES)] = 8
    max: Annotated[int, Setting("Largest batch that it takes.", ge=1, limit=MOST_IMAGES)] = 32

    def check_together(self) -> None:
        """Refuse sizes that are out of order."""
        if not self.min <= self.opt <= self.max:
            raise InputError(f"batch is '{self}'; expected 1 ≤ MIN ≤ OPT ≤ MAX")

    @classmethod
    def parse(cls, text: str) -> Batches:
        """Parse ``"1:8:32"``, or ``"8"`` for a fixed batch.

        Raises:
            InputError: the text is neither, or the sizes are not 1 ≤ MIN ≤ OPT ≤ MAX.
        """
        parts = text.split(":")
        if len(parts) == 1:
            parts *= 3
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise InputError(f"batch is {text!r}; expected MIN:OPT:MAX, 1:8:32 for one")
        low, opt, high = map(int, parts)
        if not 1 <= low <= opt <= high:
            raise InputError(f"batch is {text!r}; expected 1 ≤ MIN ≤ OPT ≤ MAX")
        if high > MOST_IMAGES:
            raise InputError(f"batch is {text!r}; expected at most {MOST_IMAGES:,} images")
        return cls(low, opt, high)

    @property
    def checked(self) -> tuple[int, ...]:
        """Return the sizes that parity is checked at: MIN, OPT, MAX and an odd one between."""
        odd = next((n for n in (5, 3, *range(self.max, self.min, -1)) if self._is_new(n)), None)
        sizes = {self.min, self.opt, self.max} | ({odd} if odd else set())
        return tuple(sorted(sizes))

    def _is_new(self, n: int) -> bool:
        return n % 2 == 1 and self.min < n < self.max and n != self.opt

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


DEFAULT_BATCHES = Batches()


def _targets(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(frozen=True)
class EngineSettings(Settings):
    """The files that are built beside the fp32 ONNX file."""

    trt: Annotated[bool, Setting("Build a TensorRT or TensorRT-RTX engine.", panel=ENGINES)] = False
    aoti: Annotated[bool, Setting("Compile with AOTInductor (.pt2).", panel=ENGINES)] = False
    fused: Annotated[
        bool,
        Setting(
            "Write fastadapt's own fused operations (.safetensors), for timm's vision transformers "
            "and ConvNeXt with a CLAdapter on NVIDIA GPUs; in bf16, or fp16 with --precision fp16.",
            panel=ENGINES,
        ),
    ] = False
    openvino: Annotated[
        bool,
        Setting("Convert for OpenVINO (.xml), for Intel's CPUs.", panel=ENGINES),
    ] = False
    executorch: Annotated[
        bool,
        Setting(
            "Convert for ExecuTorch with XNNPACK (.pte), for phones, boards and CPUs.",
            panel=ENGINES,
        ),
    ] = False
    litert: Annotated[
        bool,
        Setting("Convert for LiteRT (.tflite), for phones and boards.", panel=ENGINES),
    ] = False
    coreml: Annotated[
        bool,
        Setting(
            "Convert for Core ML (.mlpackage), for Apple's devices; in fp16 with --precision fp16.",
            panel=ENGINES,
        ),
    ] = False
    fused_attention: Annotated[
        bool,
        Setting(
            "Write the ONNX file of --precision with fused attention, too, for ONNX Runtime alone; "
            "kept only if faster where it runs.",
            panel=ENGINES,
        ),
    ] = False
    int8: Annotated[
        bool,
        Setting(
            "Quantise to INT8: an engine with --trt, else ONNX Runtime's file, and one for each of "
            "--openvino, --executorch and --litert; kept only if accurate, and faster where it "
            "runs.",
            panel=ENGINES,
        ),
    ] = False
    fp8: Annotated[
        bool,
        Setting(
            "Use FP8: for --fused, an engine with --trt, a .pt2 with --aoti --precision bf16; kept "
            "only if accurate, and faster where it runs.",
            panel=ENGINES,
        ),
    ] = False
    calibration: Annotated[
        Calibration,
        Setting(
            "With --int8: range of an activation, max (its largest values) or entropy (clipped "
            "where that keeps most information); for OpenVINO, ExecuTorch and LiteRT it is that of "
            "their quantisers.",
            panel=ENGINES,
            expected="max or entropy",
        ),
    ] = "max"
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"],
        Setting(
            "Precision of the engines; layers that need fp32 keep it.",
            panel=ENGINES,
            expected="fp32, fp16 or bf16",
        ),
    ] = "fp32"
    batch: Annotated[
        Batches,
        Setting(
            "Batch sizes that engines are built and compared for.",
            panel=ENGINES,
            metavar="MIN:OPT:MAX",
            kind=str,
            parse=Batches.parse,
        ),
    ] = DEFAULT_BATCHES
    targets: Annotated[
        tuple[str, ...],
        Setting(
            "GPUs that TensorRT-RTX builds for; none need be here.",
            panel=ENGINES,
            option="target",
            metavar="sm_XX,…",
            kind=str,
            parse=_targets,
            expected="names of GPUs, sm_89 for one",
        ),
    ] = ()
    workspace: Annotated[
        int | None,
        Setting(
            "Most MiB that a layer of TensorRT may use.",
            panel=ENGINES,
            ge=1,
            limit=100_000_000,
            expected="MiB, 1 or more",
        ),
    ] = None
    hardware_compatible: Annotated[
        bool,
        Setting(
            "Build TensorRT engines for all GPUs from Ampere on, at some cost of speed.",
            panel=ENGINES,
        ),
    ] = False
    version_compatible: Annotated[
        bool, Setting("Build TensorRT engines for later versions of it, too.", panel=ENGINES)
    ] = False
    int8_budget: Annotated[
        float,
        Setting("Accuracy that INT8 may lose, as a share.", panel=ENGINES, ge=0, lt=1),
    ] = 0.01
    fp8_budget: Annotated[
        float, Setting("Accuracy that FP8 may lose, as a share.", panel=ENGINES, ge=0, lt=1)
    ] = 0.01


@dataclass(frozen=True)
class BundleSettings(Settings):
    """How a bundle is made, of whichever model."""

    input: Annotated[
        Literal["uint8", "float"],
        Setting(
            "Input of the graph: uint8, batch × H × W × 3, as images are decoded; or float, "
            "batch × 3 × H × W, from 0 to 1.",
            panel=INPUT,
        ),
    ] = "uint8"
    normalize: Annotated[bool, Setting("Normalise inside the graph.", panel=INPUT)] = True
    resize: Annotated[
        bool,
        Setting("Resize and crop inside the graph, too: images of any size.", panel=INPUT),
    ] = False
    opset: Annotated[
        int,
        Setting(
            "ONNX opset of the graphs in fp32 and fp16; older runtimes take lower ones.",
            panel=INPUT,
            ge=18,
            le=23,
        ),
    ] = OPSET
    with_features: Annotated[
        bool,
        Setting(
            "Give the files a second output: the features before the head, for fastadapt embed.",
            panel=BUNDLE,
        ),
    ] = False
    overwrite: Annotated[bool, Setting("Replace the bundle that is there.", panel=BUNDLE)] = False
    speed: Annotated[bool, Setting("Measure images per second.", panel=BUNDLE)] = True
    golden: Annotated[
        str | None,
        Setting(
            "Images that are kept in the bundle as golden samples, where those that are compared "
            "on must not leave (patients): a folder, or synthetic ones.",
            panel=BUNDLE,
            metavar="DIR|synthetic",
            shown_default="those that are compared on",
        ),
    ] = None


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which model is exported: that of a run, or one that is named."""

    runs: Annotated[
        tuple[Path, ...],
        Setting(
            "A training run's folder, or several of one frozen backbone, which become the tasks of "
            "one graph; or give --backbone.",
            panel=MODEL,
            metavar="RUN",
            argument=True,
        ),
    ] = ()
    tasks: Annotated[
        tuple[str, ...],
        Setting(
            "Name of a task and of its output, once for each of several runs, in their order.",
            panel=MODEL,
            option="task",
            metavar="NAME",
            shown_default="the names of the runs' folders",
        ),
    ] = ()
    backbone: Annotated[
        str | None,
        Setting(
            "timm's name, for a model without a run: with --checkpoint, --peft, or timm's own "
            "weights.",
            panel=MODEL,
            metavar="NAME",
        ),
    ] = None
    checkpoint: Annotated[
        Path | None,
        Setting("File of the fine-tuned model's weights, a state dict.", panel=MODEL),
    ] = None
    checkpoint_key: Annotated[
        str | None,
        Setting(
            "Key of the state dict to take from the checkpoint, where it holds several (an EMA "
            "beside the raw weights).",
            panel=MODEL,
            metavar="KEY",
        ),
    ] = None
    features: Annotated[
        bool,
        Setting("With --backbone: export features, and leave a classifier out.", panel=MODEL),
    ] = False
    peft: Annotated[
        Path | None, Setting("Folder that PEFT wrote: a LoRA to merge.", panel=MODEL)
    ] = None
    weights: Annotated[
        str | None,
        Setting(
            "File of the backbone's weights, if they are not where training found them, or not "
            "timm's.",
            panel=MODEL,
            metavar="FILE",
        ),
    ] = None
    image_size: Annotated[
        int | None,
        Setting(
            "With --backbone: height and width of the images in pixels, if not timm's.",
            panel=MODEL,
            ge=8,
            limit=65_536,
        ),
    ] = None
    class_names: Annotated[
        Path | None,
        Setting(
            "File of class names, one a line: other classes of a GDPL run, or the names of a model "
            "given by --backbone.",
            panel=MODEL,
            option="classes",
        ),
    ] = None
    domain_input: Annotated[
        bool,
        Setting(
            "Take domain features as the graph's second input, and leave their encoder out.",
            panel=GDPL,
        ),
    ] = False
    domain_weights: Annotated[
        str | None,
        Setting("File of the domain encoder's weights, if they moved.", panel=GDPL, metavar="FILE"),
    ] = None
    domain_features: Annotated[
        Path | None,
        Setting("File of the images' features, for runs without a domain encoder.", panel=GDPL),
    ] = None


@dataclass(frozen=True)
class TargetSettings(Settings):
    """Where the bundle is written, and what it is compared on."""

    out: Annotated[
        Path | None,
        Setting("The bundle's folder; RUN/bundle if not given.", panel=BUNDLE),
    ] = None
    repository: Annotated[
        Path | None,
        Setting(
            "Add the model to this model repository of NVIDIA Triton Inference Server.",
            panel=BUNDLE,
            option="triton_repo",
        ),
    ] = None
    triton_backend: Annotated[
        Literal["onnxruntime", "tensorrt", "python"] | None,
        Setting(
            "With --triton-repo: what serves the model, onnxruntime, tensorrt or python (the whole "
            "bundle, by fa.export.load).",
            panel=BUNDLE,
            expected="onnxruntime, tensorrt or python",
            shown_default="tensorrt where the bundle holds a verified engine, else onnxruntime",
        ),
    ] = None
    images: Annotated[
        Path | None,
        Setting(
            "Folder of images to compare on, instead of the validation split; without a run, "
            "synthetic ones if not given.",
            panel=COMPARISON,
        ),
    ] = None
    onnx: Annotated[
        bool,
        Setting("Write an ONNX file, as always.", panel=BUNDLE, hidden=True),
    ] = True
    json: Annotated[bool, Setting("Print the bundle's manifest as JSON.", panel=BUNDLE)] = False


@dataclass(frozen=True)
class VerifySettings(Settings):
    """Which bundle is checked, and how."""

    bundle: Annotated[
        Path,
        Setting("Folder that fastadapt export wrote.", panel=BUNDLE, argument=True),
    ]
    rebuild: Annotated[
        bool,
        Setting("Build engines that cannot run here anew, for this machine.", panel=BUNDLE),
    ] = False
    speed: Annotated[bool, Setting("Measure images per second.", panel=BUNDLE)] = True
    measure: Annotated[
        bool,
        Setting(
            "Keep this machine's speeds in the bundle (measured.json), from which predict and "
            "fa.export.load choose the fastest file.",
            panel=BUNDLE,
        ),
    ] = False
    trust: Annotated[
        bool,
        Setting(
            "Run native code and programs (.pt2, TensorRT engines, .pte, .tflite, .mlpackage) of a "
            "bundle that was not made on this machine: trust its maker.",
            panel=BUNDLE,
        ),
    ] = False
    key: Annotated[
        Path | None,
        Setting(
            "File of the maker's public key (PEM): refuse a bundle that was not signed with it, "
            "and trust one that was.",
            panel=BUNDLE,
        ),
    ] = None
    json: Annotated[bool, Setting("Print the result as JSON.", panel=BUNDLE)] = False


@dataclass(frozen=True)
class SignSettings(Settings):
    """Which bundle is signed, and with which key."""

    bundle: Annotated[
        Path,
        Setting("Folder that fastadapt export wrote.", panel=BUNDLE, argument=True),
    ]
    key: Annotated[
        Path,
        Setting(
            "File of your private key, of an elliptic curve, in PEM (openssl ecparam -name "
            "prime256v1 -genkey -noout -out FILE).",
            panel=BUNDLE,
        ),
    ]
